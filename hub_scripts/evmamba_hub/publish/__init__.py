"""Publish models with their code and cards, and the demo, on the Hub."""
