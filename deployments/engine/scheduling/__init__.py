"""What runs in the next step, and who holds which KV block. No torch, no tensors."""
