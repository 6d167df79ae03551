"""Attention over a paged KV cache, plugged into transformers' attention interface."""
