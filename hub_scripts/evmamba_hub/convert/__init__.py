"""Convert the checkpoints of the authors for `from_pretrained`."""
