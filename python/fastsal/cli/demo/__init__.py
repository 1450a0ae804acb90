"""The command `fastsal demo` and its study of an installed model."""
