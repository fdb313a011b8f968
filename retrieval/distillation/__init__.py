"""Teaches a retrieval head what a model attends to. Needs torch (the extra `distill`)."""
