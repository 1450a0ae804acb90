"""Limits on the loss or the accuracy, tested with a finite-sample guarantee."""
