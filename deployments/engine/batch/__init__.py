"""The plain arrays of one step, and their way to a device."""
