"""Faster forms of a model's own layers, put in their place after it was loaded."""
