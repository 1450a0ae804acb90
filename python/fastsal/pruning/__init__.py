"""Pruning: score, rank, mask and compensate, in one step, in rounds, or up to a limit."""
