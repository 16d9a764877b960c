"""Other ways to run the same student: recorded passes, chosen attention, many cards, fewer bits."""
