"""What every run does: folder, randomness, processes, networks, optimisers, checkpoints, log."""
