"""What samples are worth: the judges, and how much a sample therefore counts."""
