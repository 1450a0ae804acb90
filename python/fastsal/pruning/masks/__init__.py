"""Masks: made from scores, applied to models, and stored in files."""
