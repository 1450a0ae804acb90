"""Refit kept weights to the activations of the dense model, without labels."""
