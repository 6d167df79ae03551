"""The service when more is asked of it than it can do: `make bench-overload`."""
