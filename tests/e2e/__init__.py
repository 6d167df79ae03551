"""A package, so that its modules share one Ray; see `services` in `conftest.py`."""
