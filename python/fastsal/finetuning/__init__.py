"""Fine-tune pruned models with the mask held."""
