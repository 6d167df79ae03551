"""What KV is worth by where it is, and what the shared tier costs those who share nothing."""
