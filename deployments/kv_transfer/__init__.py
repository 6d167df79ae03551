"""Moves finished KV from the engine that computed it to the engine that decodes with it.

A hand-off, from the actor's side: `exports_kv` marks the method that gives it away, `receives_kv` the one that takes
it, and whoever owns both handles passes the reference from one to the other. `layout` says what a chunk is, `base` what
can be set and counted, `group` moves bytes between two processes, `link` runs one pair of engines, whose `source`
answers what its `receiver` asks over a `line` (`inquiries`, `notes`), `pull` brings one hand-off, `local` lets engines
of one machine read each other's memory (`shared_memory`), `endpoint` holds what a process has of all that, `direct`
fits it into Ray.
"""
