"""Tokens on their way from engines to the ingress: one TCP connection per pair of them, one frame per engine step."""
