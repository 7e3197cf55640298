"""The demo as a Space: the files that `push-space` uploads, in a new directory, started by their `app.py`."""

import os
import shutil
import socket
import subprocess
import time
import venv
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from filelock import FileLock
from packaging.requirements import Requirement

from dense_models import DETECTOR, SEGMENTER, save_dense_model
from evmamba_demo.bundled import find_space_files
from evmamba_hub.images.imagenet import load_labels
from evmamba_hub.publish.push_space import MODEL_VARIABLE, collect_space_files
from kernel_cache import copy_compiled_kernels
from linked_environments import link_distributions
from modeling_evmamba import EfficientVMambaConfig, EfficientVMambaForImageClassification


DEMO = Path(__file__).parents[2] / "demo"


class Space(NamedTuple):
    url: str
    pid: int
    folder: Path
    python: Path


@pytest.fixture(scope="session")
def starting(shared_folder) -> FileLock:
    """Lets one process at a time create or start a Space. The first compiles kernels that the tests have not."""
    return FileLock(shared_folder / "starting.lock")


@pytest.fixture(scope="session")
def space_folder(shared_folder, starting) -> Path:
    """The files of the Space."""
    folder = shared_folder / "space"
    with starting:
        if not folder.exists():
            write_space(folder)
    return folder


def write_space(folder: Path) -> None:
    for name, source in collect_space_files(find_space_files(), "someone/space", "someone/model").items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(source if isinstance(source, bytes) else source.read_bytes())
    copy_compiled_kernels(folder / "evmamba_kernels")


@pytest.fixture(scope="session")
def python(space_folder, shared_folder, starting) -> Path:
    """The Python of an environment with the Space's requirements.txt alone, without the repository."""
    environment = shared_folder / "environment"
    with starting:
        if not environment.exists():
            venv.create(environment)
            requirements = (space_folder / "requirements.txt").read_text().split()
            link_distributions(environment, [Requirement(line).name for line in requirements])
    return environment / "bin" / "python"


def wait_for_answer(url: str, process: subprocess.Popen, log: Path) -> None:
    import httpx

    deadline = time.monotonic() + 300  # enough to compile the kernels on busy cores
    while True:
        with suppress(httpx.TransportError):
            if httpx.get(url, timeout=10).status_code == 200:
                return
        assert process.poll() is None and time.monotonic() < deadline, log.read_text(encoding="utf-8")
        time.sleep(0.2)


@contextmanager
def run_space(
    python: Path, folder: Path, model: Path, uploads: Path, starting: FileLock, **settings: str
) -> Iterator[Space]:
    """Run a Space that shows a model, with environment variables as settings."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    variables = os.environ | {
        MODEL_VARIABLE: str(model),
        "GRADIO_SERVER_PORT": str(port),
        "GRADIO_TEMP_DIR": str(uploads),
        "OMP_NUM_THREADS": "1",
        **settings,
    }
    variables.pop("PYTHONPATH", None)
    log = uploads.with_suffix(".log")
    url = f"http://127.0.0.1:{port}"
    with starting:
        with log.open("w") as output:
            process = subprocess.Popen(
                [python, "app.py"], cwd=folder, env=variables, stdout=output, stderr=subprocess.STDOUT
            )
        try:
            wait_for_answer(url, process, log)
        except BaseException:
            process.kill()
            raise
    try:
        yield Space(url, process.pid, folder, python)
    finally:
        process.terminate()
        process.wait()


@pytest.fixture(scope="session")
def space(python, space_folder, starting, tmp_path_factory):
    model = tmp_path_factory.mktemp("models") / "shown"
    shutil.copytree(DEMO / "digits", model)
    with run_space(python, space_folder, model, tmp_path_factory.mktemp("uploads"), starting) as space:
        yield space


@pytest.fixture(scope="session")
def photograph_space(python, space_folder, starting, tmp_path_factory):
    """A Space as the Hub runs it, with ImageNet's classes and fresh weights."""
    model = tmp_path_factory.mktemp("models") / "photographs"
    id2label = dict(enumerate(load_labels()))
    torch.manual_seed(0)
    config = EfficientVMambaConfig(
        hidden_sizes=[8, 16, 24, 32],
        depths=[1, 1, 1, 1],
        id2label=id2label,
        label2id={name: label for label, name in id2label.items()},
    )
    EfficientVMambaForImageClassification(config).save_pretrained(model)
    shutil.copyfile(DEMO / "digits" / "preprocessor_config.json", model / "preprocessor_config.json")
    settings = {"SYSTEM": "spaces", "SPACE_ID": "someone/space"}
    with run_space(python, space_folder, model, tmp_path_factory.mktemp("uploads"), starting, **settings) as space:
        yield space


@pytest.fixture(scope="session", params=[SEGMENTER, DETECTOR])
def dense_space(request, python, space_folder, starting, tmp_path_factory):
    """A Space that shows a segmentation model or a detector with fresh weights."""
    model = save_dense_model(tmp_path_factory.mktemp("models") / "dense", request.param)
    with run_space(python, space_folder, model, tmp_path_factory.mktemp("uploads"), starting) as space:
        yield space
