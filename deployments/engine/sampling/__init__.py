"""Draws of the next token."""
