"""The commands that an installation brings, one module each; `scripts/` runs the same ones from a checkout."""
