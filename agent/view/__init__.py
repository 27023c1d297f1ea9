"""To look at: what the world model predicts and imagines, and what its memory reads."""
