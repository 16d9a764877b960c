"""What every run does: its folder, randomness, processes, optimisers, checkpoints and log."""
