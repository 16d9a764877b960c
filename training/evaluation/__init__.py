"""Checkpoints compared: videos on the same prompts, their report, and a blind study."""
