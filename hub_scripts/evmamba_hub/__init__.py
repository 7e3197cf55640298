"""EfficientVMamba and the Hugging Face Hub: read images, classify, evaluate, convert, export, publish.

Each folder is a room of jobs. Jobs print nothing; `cli` reads options, calls a job and shows the result.
"""
