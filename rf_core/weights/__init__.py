"""Checkpoints and LoRAs of every published layout, read without running what they contain."""
