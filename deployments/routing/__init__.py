"""Which replica a request goes to: by what each has cached, and by what waits for it. No Ray, no torch, no HTTP.

`router.py` is asked; `scoring.py` decides, by numbers alone; `index.py` knows what is cached where, `load.py` what
waits where; `hashes.py` names the blocks of a prompt as engines do.
"""
