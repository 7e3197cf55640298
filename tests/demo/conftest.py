"""The demonstration as a Space: what `push-space` would upload, in a folder of its own, started by its `app.py`."""

import os
import shutil
import socket
import subprocess
import time
import venv
from pathlib import Path
from typing import NamedTuple

import httpx
import pytest
from packaging.requirements import Requirement

from evmamba_demo.bundled import find_space_files
from evmamba_hub.publish.push_space import MODEL_VARIABLE, collect_space_files
from linked_environments import link_distributions


DEMO = Path(__file__).parents[2] / "demo"


class Space(NamedTuple):
    url: str
    pid: int
    log: Path
    python: Path


@pytest.fixture(scope="session")
def space(tmp_path_factory):
    folder, models = tmp_path_factory.mktemp("space"), tmp_path_factory.mktemp("models")
    for name, source in collect_space_files(find_space_files(), "someone/space", "someone/model").items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(source if isinstance(source, bytes) else source.read_bytes())
    shutil.copytree(DEMO / "digits", models / "shown")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # what the Space's requirements.txt names, and nothing of the repository
    environment = tmp_path_factory.mktemp("environment")
    venv.create(environment)
    requirements = (folder / "requirements.txt").read_text().split()
    link_distributions(environment, [Requirement(line).name for line in requirements])
    python = environment / "bin" / "python"
    variables = os.environ | {
        MODEL_VARIABLE: str(models / "shown"),
        "GRADIO_SERVER_PORT": str(port),
        "GRADIO_TEMP_DIR": str(tmp_path_factory.mktemp("uploads")),
        "OMP_NUM_THREADS": "1",
    }
    variables.pop("PYTHONPATH", None)
    log = folder / "log.txt"
    with log.open("w") as output:
        process = subprocess.Popen(
            [python, "app.py"], cwd=folder, env=variables, stdout=output, stderr=subprocess.STDOUT
        )
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 300  # imports alone take a minute where every core is busy
        while True:
            try:
                if httpx.get(url, timeout=10).status_code == 200:
                    break
            except httpx.TransportError:
                pass
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.2)
        yield Space(url, process.pid, log, python)
    finally:
        process.terminate()
        process.wait()
