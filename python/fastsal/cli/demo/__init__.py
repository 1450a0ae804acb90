"""The command `fastsal demo`: a small study of a model from an installed package."""
