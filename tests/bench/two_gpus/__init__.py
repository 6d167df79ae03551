"""Colocated against disaggregated on two real GPUs: `make bench-two-gpus`."""
