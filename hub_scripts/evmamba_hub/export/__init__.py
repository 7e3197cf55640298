"""Export a classifier for other runtimes, and compare the runtimes."""
