"""What the live page costs the service, and its pictures for the documentation."""
