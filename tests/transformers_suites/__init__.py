"""transformers' common test suites, run on this model as transformers runs them on its own models."""
