"""A package, so that its modules share one Ray; see `cluster` in `conftest.py`."""
