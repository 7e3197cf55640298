"""Where `evmamba demo` listens, and what it shows. The pages have tests of their own."""

import re
import socket

import pytest
import torch

from evmamba_demo import interface
from evmamba_hub.errors import UserError


@pytest.mark.parametrize("way", ["option", "variable"])
@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0", "localhost"])
def test_a_taken_port_names_a_free_one(evmamba, monkeypatch, way, host):
    with socket.create_server((host, 0)) as taken:
        port = taken.getsockname()[1]
        options = ["--port", port] if way == "option" else []
        monkeypatch.setenv("GRADIO_SERVER_PORT", str(port) if way == "variable" else "wrong")
        code, out, err = evmamba("demo", "--host", host, *options)
    assert (code, out) == (1, "") and err.count("\n") == 1
    free = re.search(rf"another program listens on port {port} of {host}: .* such as --port (\d+)$", err.strip())
    socket.create_server((host, int(free[1]))).close()


@pytest.mark.parametrize(
    "name, value, code, message",
    [
        ("GRADIO_SERVER_PORT", "wrong", 2, "env var: 'GRADIO_SERVER_PORT'"),
        ("GRADIO_SERVER_PORT", "70000", 2, "env var: 'GRADIO_SERVER_PORT'"),
        ("GRADIO_SERVER_NAME", "203.0.113.7", 1, "cannot listen on port 7860 of '203.0.113.7': "),
        ("GRADIO_SERVER_NAME", "no such host", 1, "cannot listen on port 7860 of 'no such host': "),
    ],
)
def test_wrong_variables(evmamba, monkeypatch, name, value, code, message):
    monkeypatch.setenv(name, value)
    found, _, err = evmamba("demo")
    assert found == code and message in " ".join(err.split())


@pytest.mark.skipif(torch.accelerator.is_available(), reason="only CPUs have optimized copies")
@pytest.mark.parametrize("options, how", [([], "optimized"), (["--no-optimize"], "as it is")])
def test_a_switch_shows_the_network_as_it_is(evmamba, monkeypatch, options, how):
    def stop_before_serving(models):
        raise UserError(f"computing {models.shown.execution}")

    monkeypatch.setattr(interface, "create_app", stop_before_serving)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    code, _, err = evmamba("demo", "--port", port, *options)
    assert code == 1 and f"computing on cpu in float32, {how}" in err
