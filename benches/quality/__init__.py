"""Accuracy after pruning, of fastsal and of its peers, on real models."""
