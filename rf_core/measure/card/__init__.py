"""`python -m rf_core card`: all that a card can tell, in minutes, as a table.

The runner starts a process for every stage, with a cap on its time; a stage measures, and writes
after every measurement. What stops or breaks a stage costs the others nothing.
"""
