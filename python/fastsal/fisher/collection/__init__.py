"""Collect Fisher statistics from a model and batches of images."""
