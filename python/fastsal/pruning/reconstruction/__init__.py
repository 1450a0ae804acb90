"""Reconstruction: layer by layer, solve for the kept weights that restore the dense outputs."""
