"""What the programs of `examples/` for detection and segmentation share."""
