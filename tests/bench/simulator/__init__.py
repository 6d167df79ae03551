"""The simulator beside the service: what both make of the same requests."""
