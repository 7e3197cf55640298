"""Training of EfficientVMamba, from scratch or from a checkpoint."""
