"""The command line `evmamba` and the jobs behind it. Each job is a module; `cli.py` only reads arguments."""
