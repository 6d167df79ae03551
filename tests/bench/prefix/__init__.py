"""What routing by cached prefixes is worth to clients; see `bench_prefix.py`."""
