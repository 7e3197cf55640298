"""The demonstration: what EfficientVMamba sees in an image and how, as functions and as a web page on top of them."""
