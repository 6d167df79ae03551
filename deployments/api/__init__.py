"""The HTTP face of the system: OpenAI's API in, token ids out, text back. Knows nothing of Ray, torch or the engine."""
