"""Colocated against disaggregated on two cores: `make bench-interference`."""
