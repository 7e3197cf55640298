"""Trains EfficientVMamba, from scratch or from a checkpoint."""
