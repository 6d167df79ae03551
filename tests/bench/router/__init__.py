"""The project's router against other ways to choose an engine, on a trace and in virtual time; and what it costs."""
