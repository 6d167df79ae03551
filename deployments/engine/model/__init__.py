"""From a folder of files to a model that an engine can run, or a clear refusal."""
