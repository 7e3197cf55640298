"""The command line `evmamba`: one module per command."""

import logging


# transformers and accelerate import quantizers if they are installed, which then warn in every command
for name in ("bitsandbytes", "torchao", "torch.utils._pytree"):
    logging.getLogger(name).setLevel(logging.ERROR)
