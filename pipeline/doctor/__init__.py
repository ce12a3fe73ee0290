"""What is wrong with this machine, these settings, these servers and runs, and how to mend it."""
