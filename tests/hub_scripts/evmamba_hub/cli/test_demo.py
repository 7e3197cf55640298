"""Where `evmamba demo` listens. The pages have tests of their own."""

import re
import socket

import pytest


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
