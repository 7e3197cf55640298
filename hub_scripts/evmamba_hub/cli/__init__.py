"""The command line `evmamba`: one module per command."""
