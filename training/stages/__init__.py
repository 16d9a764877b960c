"""The stages: teacher, trajectories, regression, Re-DMD, export, evaluation."""
