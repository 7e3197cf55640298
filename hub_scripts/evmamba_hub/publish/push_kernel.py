"""`evmamba push-kernel`: upload the operators to the Kernel Hub, from which PyPI's package `kernels` loads them.

A kernel has one build per backend of PyTorch. Our builds hold the same files, those of `evmamba_kernels`. They differ
in `metadata.json` alone. The branch `vN` holds card and builds of version N, and the main branch holds the card.
"""

import json
from base64 import b64encode
from functools import partial
from hashlib import sha256
from pathlib import Path

import huggingface_hub
from huggingface_hub import ModelCard, ModelCardData, constants
from packaging.version import Version

import evmamba_kernels
from evmamba_hub.client import Files, Upload, check_repo_id, upload
from evmamba_hub.errors import UserError
from evmamba_hub.publish.bundle import find_package_folder
from modeling_evmamba import __version__


TEMPLATE = Path(__file__).parent / "data" / "kernel_card.md"

NAME = "evmamba-kernels"  # of the Python package, with the dash of kernels' names
LICENSE = "apache-2.0"

# The Kernel Hub has versions for incompatible changes only. As in semantic versions, 0 promises nothing yet.
VERSION = int(__version__.partition(".")[0])
BRANCH = f"v{VERSION}"

# Backends of PyTorch that have kernels, as `kernels` names them, and their device types. That of "mps" is "metal".
TORCH_BACKENDS = {"cpu": "cpu", "cuda": "cuda", "rocm": "cuda", "xpu": "xpu"}

BUILDS = "build/"
STALE_PATTERNS = [f"{BUILDS}*"]  # files of earlier builds

OLDEST_CLIENT = "2.3"  # the first huggingface_hub that commits to kernels


def describe_build(backend: str, hashes: dict[str, str]) -> bytes:
    """Return `metadata.json` of a build.

    Its id names the module that `kernels` creates, and so the namespace of its operators in PyTorch. A digest of the
    files makes it unique, so that several versions work in one process.

    Args:
        backend: A key of `TORCH_BACKENDS`.
        hashes: The SHA-256 of each Python file of the build in base64, by its name.
    """
    digest = sha256(json.dumps(hashes).encode()).hexdigest()[:8]
    metadata = {
        "id": f"_{evmamba_kernels.__name__}_{backend}_{digest}",
        "name": NAME,
        "version": VERSION,
        "license": LICENSE,
        "python-depends": [],  # `kernels` knows a few packages, but neither Numba nor Triton
        "backend": {"type": backend},
        "digest": {"algorithm": "sha256", "files": hashes},
    }
    return (json.dumps(metadata, indent=2) + "\n").encode()


def collect_kernel_files(repo_id: str) -> Files:
    """Collect the card and the builds by path in the repository. No connection is needed.

    Args:
        repo_id: The id of the repository, for the card.

    Raises:
        UserError: If the id is invalid, or names no owner.
    """
    check_repo_id(repo_id)
    modules = {path.name: path for path in sorted(find_package_folder(evmamba_kernels).glob("*.py"))}
    hashes = {name: b64encode(sha256(path.read_bytes()).digest()).decode() for name, path in modules.items()}
    card = ModelCard.from_template(
        ModelCardData(
            library_name="kernels", license=LICENSE, tags=["kernels", "vision", "mamba", "state-space-model"]
        ),
        template_path=str(TEMPLATE),
        title=repo_id.rpartition("/")[2],
        repo_id=repo_id,
        version=VERSION,
    )
    files: Files = {constants.REPOCARD_NAME: str(card).encode()}
    for backend in TORCH_BACKENDS:
        folder = f"{BUILDS}torch-{backend}/"
        files |= {folder + name: path for name, path in modules.items()}
        files[f"{folder}metadata.json"] = describe_build(backend, hashes)
    return files


def push_kernel(
    repo_id: str, files: Files, *, message: str, private: bool = False, create_pr: bool = False
) -> list[Upload]:
    """Upload the files of `collect_kernel_files`: all to the branch of the version, then the card to the main branch.

    `client.upload` describes arguments and errors. Files of earlier builds are deleted.

    Returns:
        The uploads to the two branches.

    Raises:
        UserError: If the Hub's client is too old to upload kernels.
    """
    if Version(huggingface_hub.__version__) < Version(OLDEST_CLIENT):
        raise UserError(
            f"uploads of kernels need huggingface_hub {OLDEST_CLIENT} or newer, not {huggingface_hub.__version__}: "
            f'run pip install "huggingface_hub>={OLDEST_CLIENT}"'
        )
    push = partial(upload, repo_id, message=message, repo_type="kernel", private=private, create_pr=create_pr)
    card = {constants.REPOCARD_NAME: files[constants.REPOCARD_NAME]}
    return [push(files=files, revision=BRANCH, stale=STALE_PATTERNS), push(files=card)]
