"""Training: what makes students, from trajectories to Re-DMD, and the miniature world."""
