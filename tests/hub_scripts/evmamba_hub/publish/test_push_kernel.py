"""`evmamba push-kernel`, and PyPI's package `kernels`, which loads what it uploads."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import huggingface_hub
import pytest
import torch
import yaml
from packaging.version import Version

import evmamba_kernels
from evmamba_hub.publish.push_kernel import BRANCH, OLDEST_CLIENT, TORCH_BACKENDS, VERSION, collect_kernel_files
from evmamba_kernels.backends import BACKENDS
from hub_server import USERS, Fault
from kernel_cache import copy_compiled_kernels
from linked_environments import link_distributions


ROOT = Path(__file__).parents[4]
REPO_ID = "someone/evmamba-kernels"
MESSAGE = "Upload the operators with evmamba push-kernel"
SOURCES = {path.name: path.read_bytes() for path in Path(evmamba_kernels.__file__).parent.glob("*.py")}


@pytest.fixture
def push(evmamba):
    """Run `evmamba push-kernel`, with a check that its output holds no token."""
    if Version(huggingface_hub.__version__) < Version(OLDEST_CLIENT):
        pytest.skip(f'uploads of kernels need another client: pip install "huggingface_hub>={OLDEST_CLIENT}"')

    def run(*options: str, repo_id: str = REPO_ID) -> tuple[int, str, str]:
        code, out, err = evmamba("push-kernel", repo_id, *options)
        assert not any(token in out + err for token in USERS)
        return code, out, err

    return run


def split_card(card: str) -> tuple[dict, str]:
    _, metadata, text = card.split("---\n", 2)
    return yaml.safe_load(metadata), text


# Uploads


def test_what_arrives(push, hub):
    code, out, err = push("--private")
    assert code == 0, err
    repo = hub.repos["kernel", REPO_ID]
    assert repo.private and repo.refs.keys() == {"main", BRANCH}
    assert out.splitlines() == [
        f"Uploaded {hub.endpoint}/kernels/{REPO_ID}/commit/{repo.refs[ref]}" for ref in (BRANCH, "main")
    ]
    assert repo.history == [MESSAGE, "initial commit"]
    files = repo.files(BRANCH)
    assert repo.files() == {name: files.pop(name) for name in (".gitattributes", "README.md")}
    ids = set()
    for backend in TORCH_BACKENDS:
        folder = f"build/torch-{backend}/"
        metadata = json.loads(files.pop(f"{folder}metadata.json"))
        assert {name: files.pop(folder + name) for name in SOURCES} == SOURCES
        assert metadata["backend"] == {"type": backend} and metadata["version"] == VERSION
        assert metadata["id"].isidentifier()
        ids.add(metadata["id"])
    assert not files and len(ids) == len(TORCH_BACKENDS)


def test_the_card(push, hub):
    assert push()[0] == 0
    metadata, text = split_card(hub.repos["kernel", REPO_ID].files()["README.md"].decode())
    assert metadata["library_name"] == "kernels" and metadata["license"] == "apache-2.0"
    assert "kernels" in metadata["tags"]
    assert f'get_kernel("{REPO_ID}", version={VERSION}, trust_remote_code=True)' in text
    assert all(f"`{name}`" in text for name in evmamba_kernels.__all__)
    assert all(f"`torch-{backend}`" in text for backend in TORCH_BACKENDS)


def test_devices_with_kernels_have_builds():
    device_types = {device_type for backend in BACKENDS.values() for device_type in backend.device_types}
    assert device_types == set(TORCH_BACKENDS.values())


def test_nothing_changed_is_no_commit(push, hub):
    assert push()[0] == 0
    refs = dict(hub.repos["kernel", REPO_ID].refs)
    assert push()[1] == "Nothing has changed since the last upload: no commit was made\n"
    assert hub.repos["kernel", REPO_ID].refs == refs


def test_another_version_replaces_the_builds(push, hub, edited_package):
    foreign = {"benchmarks/benchmark.py": b"", "build/torch-metal/__init__.py": b"", "build/torch-cpu/old.py": b""}
    repo = hub.create(REPO_ID, foreign, kind="kernel")
    assert push("--message", "First")[0] == 0
    before = repo.files(BRANCH)
    assert before.keys() == collect_kernel_files(REPO_ID).keys() | {".gitattributes", "benchmarks/benchmark.py"}
    assert repo.files().keys() >= foreign.keys()  # the main branch keeps its files
    edited_package()
    code, out, _ = push("--message", "Second")
    assert code == 0 and out.count("Uploaded") == 1  # the card has not changed
    after = repo.files(BRANCH)
    changed = {name for name in after if after[name] != before[name]}
    edited = ("backends.py", "metadata.json")
    assert changed == {f"build/torch-{backend}/{name}" for backend in TORCH_BACKENDS for name in edited}


def test_dry_run(push, hub, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    code, out, _ = push("--dry-run")
    assert code == 0 and hub.requests == []
    assert all(name in out for name in collect_kernel_files(REPO_ID))
    assert f'get_kernel("{REPO_ID}"' in out
    assert "The upload deletes other files of these names: build/*" in out


def test_the_package_kernels_is_not_needed(push, hub, monkeypatch):
    monkeypatch.setitem(sys.modules, "kernels", None)
    assert push()[0] == 0


@pytest.mark.parametrize("repo_id", [REPO_ID, "else/kernel"], ids=["own", "foreign"])
def test_pull_requests(push, hub, repo_id):
    """There is one per branch, as `kernel-builder` opens them."""
    repo = hub.create(repo_id, kind="kernel")
    if repo_id != REPO_ID:
        repo.refs[BRANCH] = repo.refs["main"]
    code, out, err = push("--create-pr", repo_id=repo_id)
    assert code == 0, err
    assert out.splitlines() == [f"Uploaded {hub.endpoint}/kernels/{repo_id}/discussions/{number}" for number in (1, 2)]
    assert repo.refs[BRANCH] == repo.refs["main"]
    assert repo.files("refs/pr/1").keys() >= {"README.md", "build/torch-cpu/metadata.json"}
    assert repo.files("refs/pr/2").keys() == {".gitattributes", "README.md"}


def test_interruptions(push, hub):
    hub.faults = [Fault("commit", 504)]
    code, _, err = push()
    assert code == 1 and "run the command again later" in err
    repo = hub.repos["kernel", REPO_ID]
    assert repo.files(BRANCH).keys() == repo.files().keys() == {".gitattributes"}
    hub.faults = [Fault("commit", lambda: None), Fault("commit", 504)]  # the second commit fails
    assert push()[0] == 1
    assert "README.md" not in repo.files()
    code, out, _ = push()
    assert code == 0 and out.count("Uploaded") == 1
    assert "README.md" in repo.files()


@pytest.mark.parametrize(
    "repo_id, message",
    [
        ("kernels", "names no owner"),
        ("a b", "is not a valid repository id"),
        ("kernels/someone/name", "is not a valid repository id"),
        ("someone/model", "is a model on the Hub, not a kernel: choose another id"),
        (
            "else/kernel",
            "does not let you create the kernel else/kernel: request access to kernels on {hub}/settings/account, and "
            "use a token that may write to else",
        ),
    ],
)
def test_wrong_repositories(push, hub, repo_id, message):
    hub.create("someone/model")
    code, out, err = push(repo_id=repo_id)
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert message.format(hub=hub.endpoint) in err
    assert ("kernel", repo_id) not in hub.repos


def test_a_kernel_of_someone_else(push, hub):
    repo = hub.create("else/kernel", kind="kernel")
    code, _, err = push(repo_id="else/kernel")
    assert code == 1 and "has no permission for this, use one that may write to else/kernel" in err
    assert repo.refs.keys() == {"main"}


def test_a_client_that_does_not_know_kernels(push, hub, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "__version__", "1.31.0")
    code, _, err = push()
    assert code == 1 and "uploads of kernels need huggingface_hub 2.3 or newer, not 1.31.0" in err
    assert hub.requests == []


def test_help_shows_the_version(push):
    assert f"version={VERSION}" in push("--help")[1]


# Kernels that were loaded


@pytest.fixture
def kernels(monkeypatch) -> ModuleType:
    # With HF_HUB_DISABLE_TELEMETRY, kernels 0.17 sends a header that httpx rejects.
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_TELEMETRY", False)
    return pytest.importorskip("kernels", reason='the package kernels is missing: run pip install ".[test]"')


@pytest.fixture
def edited_package(tmp_path, monkeypatch) -> Callable[[], None]:
    """Let the next uploads take another version of the package."""

    def edit() -> None:
        folder = tmp_path / "edited" / "evmamba_kernels"
        folder.mkdir(parents=True)
        for name, content in SOURCES.items():
            (folder / name).write_bytes(content + (b"# edited\n" if name == "backends.py" else b""))
        monkeypatch.setattr(evmamba_kernels, "__path__", [str(folder)])

    return edit


def assemble(folder: Path) -> Path:
    """Write the files of an upload to a directory."""
    for name, source in collect_kernel_files(REPO_ID).items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(source if isinstance(source, bytes) else source.read_bytes())
    return folder


@pytest.fixture
def from_hub(push, hub, kernels) -> ModuleType:
    assert push()[0] == 0
    return kernels.get_kernel(REPO_ID, version=VERSION, trust_remote_code=True)


@pytest.fixture
def edited(kernels, edited_package, tmp_path) -> ModuleType:
    """Another version, from a directory."""
    edited_package()
    return kernels.get_local_kernel(assemble(tmp_path / "local"))


OPERATORS = {
    "atrous_selective_scan": [(2, 7, 6, 24), (4, 18, 24), (4, 24, 2), (4, 24), (4, 24, 8), (4, 24)],
    "layer_norm_gated": [(2, 7, 6, 24), (2, 7, 6, 24), (24,), (24,)],
    "layer_norm_mean": [(2, 7, 6, 24), (24,), (24,)],
    "depthwise_conv": [(2, 7, 6, 24), (24, 1, 3, 3), (24,)],
    "depthwise_conv_and_mean": [(2, 7, 6, 24), (24, 1, 3, 3), (24,)],
}


def call(module: ModuleType, name: str, tensors: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    outputs = getattr(module, name)(*tensors, **({"eps": 1e-5} if name.startswith("layer_norm") else {}))
    return outputs if isinstance(outputs, tuple) else (outputs,)


def compute(module: ModuleType) -> list[torch.Tensor]:
    """Return outputs and gradients of all operators."""
    results = []
    for name, shapes in OPERATORS.items():
        generator = torch.Generator().manual_seed(0)
        tensors = [torch.randn(shape, generator=generator) * 0.3 for shape in shapes]
        results += call(module, name, tensors)
        tensors = [tensor.requires_grad_() for tensor in tensors]
        results += torch.autograd.grad(sum(y.square().sum() for y in call(module, name, tensors)), tensors)
    return results


def test_every_operator_is_computed():
    assert set(OPERATORS) == set(evmamba_kernels.__all__) - {"Choice", "choose_backend", "use_backend"}


def test_operators_of_pytorch(from_hub):
    assert from_hub.__all__ == evmamba_kernels.__all__
    with from_hub.use_backend("torch"), evmamba_kernels.use_backend("torch"):
        results, expected = compute(from_hub), compute(evmamba_kernels)
    assert all(map(torch.equal, results, expected)) and len(results) == len(expected)


def test_copies_in_one_process(from_hub, edited):
    """They have their own operators and settings, and give the same bits."""
    copies = [evmamba_kernels, from_hub, edited]
    assert all(hasattr(getattr(torch.ops, copy.__name__), "atrous_selective_scan") for copy in copies)
    assert len({copy.__name__ for copy in copies}) == 3
    with edited.use_backend("torch"):
        assert [copy.choose_backend("cpu", torch.float32).backend for copy in copies] == ["numba", "numba", "torch"]
    tensors = [torch.randn(shape) for shape in OPERATORS["layer_norm_gated"]]
    outputs = [call(copy, "layer_norm_gated", tensors)[0] for copy in copies]
    assert torch.equal(outputs[0], outputs[1]) and torch.equal(outputs[0], outputs[2])


def test_one_version_from_two_places(from_hub, kernels, tmp_path):
    """Both copies have one name. The second one must not free the operators of the first one."""
    again = kernels.get_local_kernel(assemble(tmp_path / "local"))
    assert again is not from_hub and again.__name__ == from_hub.__name__
    tensors = [torch.empty(shape, device="meta") for shape in OPERATORS["atrous_selective_scan"]]
    for copy in (again, from_hub):
        assert call(copy, "atrous_selective_scan", tensors)[0].shape == tensors[0].shape


def test_graphs_hold_the_operator(from_hub):
    class Scan(torch.nn.Module):
        def forward(self, *tensors):
            return from_hub.atrous_selective_scan(*tensors)

    tensors = [torch.randn(shape) for shape in OPERATORS["atrous_selective_scan"]]
    program = torch.export.export(Scan(), tuple(tensors))
    targets = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert targets == [f"{from_hub.__name__}.atrous_selective_scan.default"]


def test_what_kernels_says(push, hub, kernels, tmp_path):
    assert push()[0] == 0
    assert kernels.has_kernel(REPO_ID, version=VERSION, trust_remote_code=True)
    decisions = {each.variant.variant_str: each for each in kernels.get_kernel_variants(REPO_ID, version=VERSION)}
    assert decisions.keys() == {f"torch-{backend}" for backend in TORCH_BACKENDS}
    assert isinstance(decisions["torch-cpu"], kernels.VariantAccepted) == (torch.version.cuda is None)
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        kernels.get_kernel(REPO_ID, version=VERSION)
    with pytest.raises(ValueError, match=f"available versions: {VERSION}"):
        kernels.get_kernel(REPO_ID, version=VERSION + 1, trust_remote_code=True)


@pytest.mark.parametrize("backend", TORCH_BACKENDS)
def test_metadata_are_those_of_kernels(kernels, tmp_path, backend):
    from kernels._rust import Digest, DigestAlgorithm

    folder = assemble(tmp_path) / "build" / f"torch-{backend}"
    metadata = kernels.Metadata.read_from_file(folder / "metadata.json")
    assert metadata.name.python_name == evmamba_kernels.__name__
    assert str(metadata.backend.backend_type).lower() == backend
    metadata.digest.validate(Digest.hash_variant(DigestAlgorithm.SHA256, folder))
    assert kernels.get_local_kernel(folder).__name__ == metadata.id


def find_snippet(text: str) -> str:
    (code,) = re.findall(r"^```python\n((?:(?!^```).)*get_kernel.*?)^```", text, re.DOTALL | re.MULTILINE)
    return code


def test_the_snippet_of_the_documentation(push, hub, kernels, capsys):
    assert push()[0] == 0
    exec(find_snippet((ROOT / "docs" / "kernels.md").read_text()), {})
    assert capsys.readouterr().out == "the first backend in the list that supports cpu\n"


@pytest.mark.parametrize("numba", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["without", "with numba"])
def test_the_card_in_a_clean_environment(push, hub, kernels, tmp_path, numba):
    assert push()[0] == 0
    code = find_snippet(hub.repos["kernel", REPO_ID].files()["README.md"].decode())
    environment = tmp_path / "environment"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", environment], check=True)
    link_distributions(environment, ["torch", "kernels", *(["numba"] if numba else [])])
    variables = {name: os.environ[name] for name in ("PATH", "HF_ENDPOINT", "HF_HUB_DISABLE_XET")}
    completed = subprocess.run(
        [environment / "bin" / "python", "-c", code],
        cwd=environment,
        env={**variables, "HOME": str(environment), "HF_HOME": str(environment / "home"), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert completed.returncode == 0, completed.stderr
    shape, reason = completed.stdout.splitlines()
    assert shape == "torch.Size([2, 15, 14, 32])"
    if numba:
        assert reason == "the first backend in the list that supports cpu"
    else:
        assert reason.startswith("the CPU kernels of the atrous selective scan need numba: pip install numba")


@pytest.mark.slow
def test_numba_kernels_of_copies_at_once(from_hub, edited):
    """Several threads compile the kernels of the edited copy. The other copies find them compiled."""
    copy_compiled_kernels(Path(from_hub.__file__).parent)
    copies = [evmamba_kernels, from_hub, edited] * 4
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        expected = compute(evmamba_kernels)
        with ThreadPoolExecutor(len(copies)) as pool:
            for results in pool.map(compute, copies):
                assert all(map(torch.equal, results, expected))
    finally:
        torch.set_num_threads(before)
