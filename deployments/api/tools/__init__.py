"""Tools: what callers may offer a model, how models of each family call them, and how such calls are read."""
