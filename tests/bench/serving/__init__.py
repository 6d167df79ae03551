"""`make bench-serving`: what the serving layer costs and adds, with an engine that only keeps time."""
