"""Classify image files, and evaluate a classifier on a dataset."""
