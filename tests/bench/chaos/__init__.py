"""The service in a storm of faults, and what its clients see of it: `make bench-chaos`."""
