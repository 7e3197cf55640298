"""transformers' own common test suites, run on this model as transformers runs them on the models it ships."""
