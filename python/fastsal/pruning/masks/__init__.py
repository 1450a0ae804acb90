"""Masks: from scores to masks, and masks on models and in files."""
