"""What makes teachers and students, and what is done with them."""
