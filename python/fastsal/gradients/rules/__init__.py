"""Rules that form per-sample gradients, one file per family of operations."""
