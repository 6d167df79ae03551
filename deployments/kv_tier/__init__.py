"""A tier of KV beside the engines' own caches: blocks that outlive their engine, for any engine that fits them.

`policy.py` decides, `index.py` counts, `keys.py` names, `store.py` says what an engine may ask, `ray_store.py` is the
real thing. An engine's side of it is `engine_tier.py`, outside of this room.
"""
