"""The paged KV pool of an engine: its memory, and copies into and out of it."""
