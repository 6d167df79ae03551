"""Runs steps on a device: portable and CUDA runners, graphs, and how much memory the largest step takes."""
