"""Models: building, weights, inputs, features, and which parameters are selected."""
