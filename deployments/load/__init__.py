"""What the pools' numbers say of their load, and who may come in."""
