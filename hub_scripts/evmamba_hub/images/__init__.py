"""Image files and datasets of labeled images."""
