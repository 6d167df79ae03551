"""Load tests: they speak HTTP to a running service and import nothing of the project."""
