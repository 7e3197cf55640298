"""The model's code as flat files, for repositories that are used with `trust_remote_code=True`.

transformers copies a module of a repository, and the siblings that it imports as `from .sibling import name`. Our
modules import each other in this way alone, except for the seams. A seam is a module of `modeling_evmamba` that
re-exports an operator of `evmamba_kernels`. In a bundle, the operator's own file of the same name replaces the seam.
No file is changed.
"""

import shutil
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType

from transformers.dynamic_module_utils import get_relative_import_files

import evmamba_kernels
import modeling_evmamba


AUTO_MAP = {
    "AutoConfig": "configuration_evmamba.EfficientVMambaConfig",
    "AutoModel": "modeling_evmamba.EfficientVMambaModel",
    "AutoModelForImageClassification": "modeling_evmamba.EfficientVMambaForImageClassification",
    "AutoBackbone": "modeling_evmamba.EfficientVMambaBackbone",
}


def find_package_folder(package: ModuleType) -> Path:
    """Returns the directory of a package."""
    return Path(package.__path__[0])


def find_modules(package: ModuleType) -> dict[str, Path]:
    """Returns the modules of a package by file name, without `__init__.py`."""
    return {
        path.name: path for path in sorted(find_package_folder(package).glob("*.py")) if path.name != "__init__.py"
    }


@cache
def find_remote_code() -> dict[str, Path]:
    """Returns the files that transformers loads for the classes of `AUTO_MAP`, by file name in a bundle.

    A function of transformers follows the imports.
    """
    modules = find_modules(modeling_evmamba) | find_modules(evmamba_kernels)
    entries = {f"{place.partition('.')[0]}.py" for place in AUTO_MAP.values()}
    with TemporaryDirectory() as folder:
        for name, path in modules.items():
            shutil.copyfile(path, Path(folder, name))
        imported = {Path(file).name for entry in entries for file in get_relative_import_files(Path(folder, entry))}
    return {name: modules[name] for name in sorted(entries | imported)}
