"""Settings that must precede the imports of the libraries, the Hub of the tests, and files that processes share."""

import gc
import os
import re
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from hub_server import HubServer
from kernel_cache import compile_kernels


# huggingface_hub reads these at import. They keep the tests off the user's own cache and login.
hub_server = HubServer()
hub_home = TemporaryDirectory(prefix="evmamba-hub-home-")
os.environ |= {
    "HF_ENDPOINT": hub_server.endpoint,
    "HF_HOME": hub_home.name,
    "HF_HUB_DISABLE_XET": "1",  # Xet has another protocol and server. Without it, the client speaks plain LFS.
    "HF_HUB_DISABLE_TELEMETRY": "1",
}
for name in (
    "HF_TOKEN",
    "HUGGING_FACE_HUB_TOKEN",
    "HF_HUB_CACHE",
    "KERNELS_CACHE",
    "HF_HUB_OFFLINE",
    "TRANSFORMERS_OFFLINE",
):
    os.environ.pop(name, None)

import torch  # noqa: E402


with suppress(ImportError):
    import datasets.config

    # datasets sleeps after each shuffled stream, for 5 seconds, until Arrow's threads have ended.
    datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN = 0.1

# What test modules import of the extra `test`, and of the packages that it brings.
OPTIONAL_PACKAGES = {
    "accelerate",
    "datasets",
    "filelock",
    "gradio",
    "gradio_client",
    "httpx",
    "hypothesis",
    "markdown_it",
    "matplotlib",
    "nbclient",
    "nbformat",
    "numba",
    "onnx",
    "onnxruntime",
    "onnxscript",
    "pandas",
    "parameterized",
    "playwright",
    "pycocotools",
    "scipy",
    "sklearn",
    "torchmetrics",
    "triton",
}

# When transformers saves or loads a detector, it compiles thousands of patterns. `re` keeps 512 by default.
re._MAXCACHE = 10_000

# Parallel tests (pytest -n) on small maps gain nothing from threads, which would wait for each other.
torch.set_num_threads(1)


def pytest_sessionstart() -> None:
    """Compile the CPU kernels into Numba's cache. Parallel processes (pytest -n) share them out."""
    worker = os.environ.get("PYTEST_XDIST_WORKER")
    if worker is not None:
        compile_kernels(int(worker.removeprefix("gw")), int(os.environ["PYTEST_XDIST_WORKER_COUNT"]))


def pytest_collection_finish() -> None:
    """Let no garbage collection look at what the imports created, which takes it half a second. Trainers call it."""
    gc.freeze()


def pytest_unconfigure() -> None:
    gc.unfreeze()


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector):
    """Skip the tests of a module that imports an optional package which is missing."""
    try:
        report = yield
    except SystemExit as error:  # of an example, which names what is missing
        return pytest.CollectReport(
            collector.nodeid, "skipped", (str(collector.path), 1, f"Skipped: {error.__context__}"), []
        )
    error = report.call.excinfo and report.call.excinfo.value
    while error is not None:
        package = error.name.partition(".")[0] if isinstance(error, ModuleNotFoundError) else None
        if package in OPTIONAL_PACKAGES:
            report.outcome = "skipped"
            report.longrepr = (str(collector.path), 1, f'Skipped: needs {package}: pip install ".[test]"')
        error = error.__cause__
    return report


@pytest.fixture
def hub(monkeypatch) -> HubServer:
    """The empty Hub of the tests. The client is logged in as its user "someone"."""
    from hub_server import WRITE_TOKEN

    monkeypatch.setenv("HF_TOKEN", WRITE_TOKEN)
    hub_server.reset()
    return hub_server


@pytest.fixture(scope="session", autouse=True)
def running_hub():
    hub_server.start()
    yield
    hub_server.stop()
    hub_home.cleanup()


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory) -> Path:
    """A directory for all processes of pytest-xdist."""
    folder = tmp_path_factory.getbasetemp()
    return folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder


@pytest.fixture(scope="session")
def digits_onnx(shared_folder) -> Path:
    """The bundled model in a directory of ONNX files, which the first process that needs it writes."""
    from filelock import FileLock

    from evmamba_demo.bundled import find_bundled_model
    from evmamba_hub.publish.onnx_folder import export_onnx_folder

    folder = shared_folder / "digits-onnx"
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            export_onnx_folder(str(find_bundled_model()), folder)
    return folder
