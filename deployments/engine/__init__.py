"""The inference engine: one class serves every role. Knows nothing of Ray, HTTP or text."""
