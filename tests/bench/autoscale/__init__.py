"""Pools that scale, on modelled engines: the parts of `make bench-autoscale`."""
