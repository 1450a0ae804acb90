"""Sinks: how per-sample gradients are added to the sums."""
