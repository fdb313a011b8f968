"""Weights in motion: models larger than memory, streamed from disk just ahead of the computation."""
