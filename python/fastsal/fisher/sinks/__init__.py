"""Sinks: the ways in which per-sample gradients reach the statistics."""
