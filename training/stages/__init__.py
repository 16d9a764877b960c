"""What makes students: trajectories, regression, Re-DMD, and what is done with them."""
