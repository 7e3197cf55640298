"""EfficientVMamba and the Hugging Face Hub: read images, classify, evaluate, convert, export, publish.

Each subpackage holds jobs. Jobs print nothing. `cli` reads the options, calls a job, and shows the result.
"""
