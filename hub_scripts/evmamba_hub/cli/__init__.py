"""The command line `evmamba`: one module per command."""

import logging


# transformers imports torchao if it is installed, which then warns of itself in every command
for name in ("torchao", "torch.utils._pytree"):
    logging.getLogger(name).setLevel(logging.ERROR)
