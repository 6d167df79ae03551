"""An engine's side of the shared tier: what of its cache it gives (`giving.py`), and what it fetches (`fetching.py`).

All of it happens beside the steps, on threads of its own. `tier.py` holds a request back while the tier may have its
prompt; `loop.py` says what of the engine's loop is needed. Knows no Ray.
"""
