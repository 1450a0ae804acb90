"""Removal of whole hidden units, attention heads and channels: a model that is smaller."""
