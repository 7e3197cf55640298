"""The model's code as flat files, for repositories that are used with `trust_remote_code=True`.

transformers copies a module of a repository and the siblings that it imports as `from .sibling import name`, nothing
else. Our modules import each other in no other way, but for the seams: modules of `modeling_evmamba` that re-export
an operator from `evmamba_kernels`. In a bundle, the operator's own file of the same name takes the place of the seam,
so that every file is shipped as it lies in the repository.
"""

from pathlib import Path

import evmamba_kernels
import modeling_evmamba


AUTO_MAP = {
    "AutoConfig": "configuration_evmamba.EfficientVMambaConfig",
    "AutoModel": "modeling_evmamba.EfficientVMambaModel",
    "AutoModelForImageClassification": "modeling_evmamba.EfficientVMambaForImageClassification",
    "AutoBackbone": "modeling_evmamba.EfficientVMambaBackbone",
}


def find_modules(package) -> dict[str, Path]:
    """The modules of a package by file name, without the package's own."""
    folder = Path(package.__file__).parent
    return {path.name: path for path in sorted(folder.glob("*.py")) if path.name != "__init__.py"}


def find_remote_code() -> dict[str, Path]:
    """Files by the name that they have in a bundle."""
    return find_modules(modeling_evmamba) | find_modules(evmamba_kernels)
