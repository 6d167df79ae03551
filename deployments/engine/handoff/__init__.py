"""A prompt's KV on its way between two engines: states, leases, and what copies it out."""
