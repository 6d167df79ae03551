"""The service under steady load for long, and what it gathers: `make bench-soak`."""
