"""To look at: what the world model predicts and imagines, and what its memory reads."""

VIEWS = ("open_loop", "imagined", "memory", "policy")

PREDICTED = {"open_loop", "imagined"}
"""Those that observe a few steps and predict others."""
