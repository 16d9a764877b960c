"""Prompts and their embeddings, clips and what is cut from them, trajectories on disk."""
