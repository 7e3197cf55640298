"""Convert the authors' checkpoints for `from_pretrained`."""
