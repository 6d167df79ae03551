"""Thoughts: what a model writes for itself before it answers, and how that is told from the answer."""
