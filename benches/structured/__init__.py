"""Units that are removed from models, and what it does to them."""
