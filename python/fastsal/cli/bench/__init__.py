"""Benchmarks of the core and the gradient engine against peers, as ratios within one run.

This file imports nothing, so that `fastsal --help` starts without torch.
"""
