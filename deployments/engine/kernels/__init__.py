"""Kernels of our own, one file per kind of device. No layer, model or cache is known here."""
