"""Labeled images: reading, batching, corrupting, and holding some of them out."""
