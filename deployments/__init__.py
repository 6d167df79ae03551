"""Prefill and decode deployments, the engine under them, and the API in front of them."""
