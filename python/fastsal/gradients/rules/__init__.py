"""Rules that compute per-sample gradients, one file per family of operations."""
