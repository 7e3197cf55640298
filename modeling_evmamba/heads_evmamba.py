"""Configurations of the heads of transformers that take a backbone, for remote code.

In the repository of such a model, `auto_map` names a configuration of this module. Thus transformers imports the
module before it reads the fields, and finds the type of the backbone registered.
"""

import transformers
from transformers import CONFIG_MAPPING, AutoBackbone, AutoConfig

from .configuration_evmamba import EfficientVMambaConfig
from .modeling_evmamba import EfficientVMambaBackbone


if EfficientVMambaConfig.model_type not in CONFIG_MAPPING:  # else the package is installed, or a repository was loaded
    AutoConfig.register(EfficientVMambaConfig.model_type, EfficientVMambaConfig)
    AutoBackbone.register(EfficientVMambaConfig, EfficientVMambaBackbone)


def __getattr__(name: str) -> type:
    """Return the configuration of transformers with this name, as a subclass.

    transformers marks the class that it loads as remote code, and saves the files of its module with a model.
    """
    if not name.endswith("Config"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return type(name, (getattr(transformers, name),), {"__module__": __name__})
