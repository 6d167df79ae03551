"""Grammars of answers inside an engine."""
