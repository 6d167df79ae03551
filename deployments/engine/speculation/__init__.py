"""Speculative decoding: guesses of the next tokens, tried by the model in one step. It changes no answer."""
