"""Checkpoints compared: measures that need no model, a report, and a blind study."""
