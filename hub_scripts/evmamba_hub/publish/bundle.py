"""The model's code as flat files, for repositories that are used with `trust_remote_code=True`.

transformers copies a module of a repository, and the siblings that it imports as `from .sibling import name`. Our
modules import each other in this way alone, except for the seams. A seam is a module of `modeling_evmamba` that
re-exports an operator of `evmamba_kernels`. In a bundle, the operator's own file of the same name replaces the seam.
No file is changed.
"""

import shutil
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType

from transformers import PreTrainedConfig
from transformers.dynamic_module_utils import get_relative_import_files

import evmamba_kernels
import modeling_evmamba
from modeling_evmamba import EfficientVMambaConfig


AUTO_MAP = {
    "AutoConfig": "configuration_evmamba.EfficientVMambaConfig",
    "AutoModel": "modeling_evmamba.EfficientVMambaModel",
    "AutoModelForImageClassification": "modeling_evmamba.EfficientVMambaForImageClassification",
    "AutoBackbone": "modeling_evmamba.EfficientVMambaBackbone",
}


HEADS_MODULE = "heads_evmamba"


def find_auto_map(config: PreTrainedConfig) -> dict[str, str]:
    """Return the `auto_map` for a model: that of the network, or that of a head around the backbone."""
    if isinstance(config, EfficientVMambaConfig):
        return AUTO_MAP
    return {"AutoConfig": f"{HEADS_MODULE}.{type(config).__name__}"}


def find_package_folder(package: ModuleType) -> Path:
    """Return the directory of a package."""
    return Path(package.__path__[0])


def find_modules(package: ModuleType) -> dict[str, Path]:
    """Return the modules of a package by file name, without `__init__.py`."""
    return {
        path.name: path for path in sorted(find_package_folder(package).glob("*.py")) if path.name != "__init__.py"
    }


def find_remote_code(auto_map: Mapping[str, str] = AUTO_MAP) -> dict[str, Path]:
    """Return the files that transformers loads for the classes of an `auto_map`, by file name in a bundle."""
    return find_imported_files(frozenset(f"{place.partition('.')[0]}.py" for place in auto_map.values()))


@cache
def find_imported_files(entries: frozenset[str]) -> dict[str, Path]:
    """Return files of the bundle and those that they import. A function of transformers follows the imports."""
    modules = find_modules(modeling_evmamba) | find_modules(evmamba_kernels)
    with TemporaryDirectory() as folder:
        for name, path in modules.items():
            shutil.copyfile(path, Path(folder, name))
        imported = {Path(file).name for entry in entries for file in get_relative_import_files(Path(folder, entry))}
    return {name: modules[name] for name in sorted(entries | imported)}
