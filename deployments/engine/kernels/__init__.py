"""Kernels of our own; files of one kind of device begin with its name. No layer, model or cache is known here."""
