"""Run a classifier: on image files, and over a whole dataset."""
