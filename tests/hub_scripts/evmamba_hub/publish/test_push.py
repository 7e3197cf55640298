"""`evmamba push` to the Hub of the tests: uploaded files, rejected input, interruptions."""

import json
import os
import shutil
import signal
import sys
import time
from fnmatch import fnmatch
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageClassification
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from evmamba_hub.cli.main import main
from evmamba_hub.cli.uploads import UPLOAD_MESSAGE
from evmamba_hub.publish.bundle import AUTO_MAP
from evmamba_hub.publish.push import collect_model_files
from hub_server import OTHER_TOKEN, READ_TOKEN, USERS, Fault
from modeling_evmamba import EfficientVMambaBackbone, EfficientVMambaConfig, EfficientVMambaForImageClassification
from weights import assert_same_weights


ROOT = Path(__file__).parents[4]
DIGITS = ROOT / "demo" / "digits"
REPO_ID = "someone/digits"
PHASES = ["info", "create", "validate", "preupload", "batch", "upload", "verify", "commit"]


@pytest.fixture
def evmamba(evmamba):
    """The command line, with a check that its output holds no token."""

    def run(*arguments):
        code, out, err = evmamba(*arguments)
        assert not any(token in out + err for token in [*USERS, "hf_Invalid"])
        assert "Traceback" not in err
        return code, out, err

    return run


@pytest.fixture
def model_dir(tmp_path) -> Path:
    shutil.copytree(DIGITS, tmp_path / "model")
    return tmp_path / "model"


def change_weights(model_dir: Path) -> None:
    tensors = load_file(model_dir / "model.safetensors")
    tensors["classifier.bias"] += 1
    save_file(tensors, model_dir / "model.safetensors", metadata={"format": "pt"})


def test_what_arrives(evmamba, hub):
    code, out, err = evmamba("push", DIGITS, REPO_ID)
    assert code == 0, err
    repo = hub.repos["model", REPO_ID]
    assert f"{hub.endpoint}/{REPO_ID}/commit/{repo.refs['main']}" in out
    assert repo.history == [UPLOAD_MESSAGE, "initial commit"]
    assert not repo.private

    files = repo.files()
    for name in ("model.safetensors", "preprocessor_config.json", "README.md"):
        assert files.pop(name) == (DIGITS / name).read_bytes()
    config = json.loads(files.pop("config.json"))
    assert config.pop("auto_map") == AUTO_MAP
    assert config == json.loads((DIGITS / "config.json").read_text())
    del files[".gitattributes"]
    for name in ("configuration_evmamba.py", "modeling_evmamba.py"):
        assert files.pop(name) == (ROOT / "modeling_evmamba" / name).read_bytes()
    assert {"atrous_selective_scan.py", "backends.py", "layer_norm.py"} <= files.keys()
    for name, content in files.items():
        assert content == (ROOT / "kernels" / "evmamba_kernels" / name).read_bytes()
    assert not any(token.encode() in content for token in USERS for content in repo.files().values())


def test_round_trip(evmamba, hub):
    assert evmamba("push", DIGITS, REPO_ID)[0] == 0
    model = AutoModelForImageClassification.from_pretrained(REPO_ID)
    assert type(model) is EfficientVMambaForImageClassification
    assert_same_weights(model.state_dict(), EfficientVMambaForImageClassification.from_pretrained(DIGITS).state_dict())
    assert AutoImageProcessor.from_pretrained(REPO_ID).size == {"shortest_edge": 32}


def test_nothing_changed_is_no_commit(evmamba, hub, model_dir):
    assert evmamba("push", model_dir, REPO_ID)[0] == 0
    for _ in range(2):
        code, out, _ = evmamba("push", model_dir, REPO_ID)
        assert code == 0 and "no commit was made" in out
    assert len(hub.repos["model", REPO_ID].history) == 2
    assert hub.phases().count("commit") == hub.phases().count("upload") == 1

    change_weights(model_dir)
    assert "Uploaded" in evmamba("push", model_dir, REPO_ID, "--message", "New weights")[1]
    assert hub.repos["model", REPO_ID].history == ["New weights", UPLOAD_MESSAGE, "initial commit"]


def test_dry_run_touches_no_network(evmamba, hub, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    code, out, err = evmamba("push", DIGITS, REPO_ID, "--dry-run")
    assert code == 0, err
    assert hub.requests == []
    lines = [line.split() for line in out.splitlines()]
    sizes = {words[1]: words[3] for words in lines if len(words) == 5 and words[0] == "│" and "." in words[1]}
    assert sizes["model.safetensors"] == f"{(DIGITS / 'model.safetensors').stat().st_size:,}"
    assert sizes.keys() == collect_model_files(DIGITS, REPO_ID).keys()
    assert (DIGITS / "README.md").read_text() in out
    assert "The upload deletes other files of these names: model.safetensors, model-" in out


def test_private_branch_and_pull_request(evmamba, hub, model_dir):
    assert evmamba("push", model_dir, REPO_ID, "--private")[0] == 0
    repo = hub.repos["model", REPO_ID]
    assert repo.private
    first = repo.refs["main"]

    change_weights(model_dir)
    assert evmamba("push", model_dir, REPO_ID, "--revision", "experiment")[0] == 0
    assert evmamba("push", model_dir, REPO_ID, "--revision", "experiment")[1].startswith("Nothing has changed")
    assert repo.refs["main"] == first
    assert repo.commits[repo.refs["experiment"]].parent == first

    code, out, _ = evmamba("push", model_dir, REPO_ID, "--create-pr")
    assert code == 0 and f"{hub.endpoint}/{REPO_ID}/discussions/1" in out
    assert repo.refs["main"] == first
    assert repo.files("refs/pr/1")["model.safetensors"] == (model_dir / "model.safetensors").read_bytes()
    assert evmamba("push", model_dir, REPO_ID, "--revision", "refs/pr/1")[1].startswith("Nothing has changed")


def test_pull_request_to_a_repository_of_someone_else(evmamba, hub, monkeypatch):
    hub.create("else/model", {"config.json": b"{}"})
    code, _, err = evmamba("push", DIGITS, "else/model")
    assert code == 1 and "no permission" in err
    assert evmamba("push", DIGITS, "else/model", "--create-pr")[0] == 0
    assert list(hub.repos["model", "else/model"].refs) == ["main", "refs/pr/1"]


def test_token_of_the_login(evmamba, hub, monkeypatch):
    """Use the file that `hf auth login` writes."""
    token = os.environ["HF_TOKEN"]
    monkeypatch.delenv("HF_TOKEN")
    path = Path(constants.HF_TOKEN_PATH)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(token, encoding="utf-8")
    try:
        assert evmamba("push", DIGITS, REPO_ID)[0] == 0
    finally:
        path.unlink()


def test_large_files_in_parts(evmamba, hub):
    hub.multipart_size = 100_000
    try:
        assert evmamba("push", DIGITS, REPO_ID)[0] == 0
    finally:
        hub.multipart_size = None
    assert hub.phases().count("upload") == 6
    assert hub.repos["model", REPO_ID].files()["model.safetensors"] == (DIGITS / "model.safetensors").read_bytes()


def test_shards_replace_one_file_and_back(evmamba, hub, tmp_path):
    model = EfficientVMambaForImageClassification.from_pretrained(DIGITS)
    shutil.copytree(DIGITS, tmp_path / "sharded", ignore=shutil.ignore_patterns("*.safetensors"))
    model.save_pretrained(tmp_path / "sharded", max_shard_size="200KB")
    shards = sorted(path.name for path in (tmp_path / "sharded").glob("*.safetensors"))
    assert len(shards) > 1

    assert evmamba("push", DIGITS, REPO_ID)[0] == 0
    assert evmamba("push", tmp_path / "sharded", REPO_ID)[0] == 0
    weights = [name for name in hub.repos["model", REPO_ID].files() if "safetensors" in name]
    assert sorted(weights) == [*shards, "model.safetensors.index.json"]
    loaded = AutoModelForImageClassification.from_pretrained(REPO_ID)
    assert type(loaded) is type(model)
    assert_same_weights(loaded.state_dict(), model.state_dict())

    assert evmamba("push", DIGITS, REPO_ID)[0] == 0
    assert [name for name in hub.repos["model", REPO_ID].files() if "safetensors" in name] == ["model.safetensors"]


def test_only_weights_that_would_be_loaded_in_place_of_the_new_ones_are_deleted(evmamba, hub):
    stale = [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
        "pytorch_model.bin",
        "pytorch_model-00001-of-00001.bin",
        "pytorch_model.bin.index.json",
    ]
    kept = [
        "model.fp16.safetensors",
        "model.fp16-00001-of-00002.safetensors",
        "model.safetensors.index.fp16.json",
        "pytorch_model.fp16.bin",
        "model_quantized.safetensors",
        "onnx/model.safetensors",
        "training_args.bin",
    ]
    hub.create(REPO_ID, dict.fromkeys(["model.safetensors", *stale, *kept], b"earlier"))
    assert evmamba("push", DIGITS, REPO_ID)[0] == 0
    files = hub.repos["model", REPO_ID].files()
    assert files["model.safetensors"] == (DIGITS / "model.safetensors").read_bytes()
    assert not files.keys() & set(stale)
    assert files.keys() >= set(kept)

    shown = evmamba("push", DIGITS, REPO_ID, "--dry-run")[1]
    (line,) = [line for line in shown.splitlines() if line.startswith("The upload deletes")]
    patterns = line.partition(": ")[2].split(", ")
    assert all(any(fnmatch(name, pattern) for pattern in patterns) for name in stale)
    assert not any(fnmatch(name, pattern) for pattern in patterns for name in kept)


def test_backbone(evmamba, hub, tmp_path):
    config = EfficientVMambaConfig(hidden_sizes=[8] * 4, depths=[1] * 4, out_features=["stage2", "stage4"])
    EfficientVMambaBackbone(config).save_pretrained(tmp_path / "backbone")
    shutil.copy(DIGITS / "preprocessor_config.json", tmp_path / "backbone")
    assert evmamba("push", tmp_path / "backbone", "someone/backbone")[0] == 0
    card = hub.repos["model", "someone/backbone"].files()["README.md"].decode()
    assert "pipeline_tag: image-feature-extraction" in card
    assert 'out_features=["stage2", "stage4"]' in card and "AutoModelForImageClassification" not in card


# Rejected input


@pytest.mark.parametrize(
    "repo_id, fragments",
    [
        ("someone/digits/more", ["is not a valid repository id", "user/name"]),
        ("someone/--", ["is not a valid repository id"]),
        ("someone/dig its", ["is not a valid repository id"]),
        ("digits", ["names no owner", "user/name"]),
        ("else/digits", ["answered 403", "no permission"]),
        ("someone/data", ["someone/data is a dataset on the Hub, not a model", "another id"]),
        ("someone/space", ["someone/space is a space on the Hub, not a model"]),
    ],
)
def test_wrong_repositories(evmamba, hub, repo_id, fragments):
    hub.create("someone/data", kind="dataset")
    hub.create("someone/space", kind="space", sdk="gradio")
    code, out, err = evmamba("push", DIGITS, repo_id)
    assert (code, out) == (1, "")
    assert err.startswith("Error: ") and err.count("\n") == 1
    for fragment in fragments:
        assert fragment in err
    assert not [kind for kind, _ in hub.repos if kind == "model"]


@pytest.mark.parametrize(
    "token, fragments",
    [
        (None, ["no access token", "`hf auth login`", "HF_TOKEN"]),
        ("hf_InvalidSecret", ["answered 401", "is invalid or has expired", "`hf auth login`"]),
        (READ_TOKEN, ["answered 403", "no permission"]),
        (OTHER_TOKEN, ["answered 403", "no permission"]),
    ],
    ids=["none", "invalid", "read", "other"],
)
def test_tokens_without_rights(evmamba, hub, monkeypatch, token, fragments):
    hub.create(REPO_ID, {"config.json": b"{}"})
    before = hub.repos["model", REPO_ID].refs["main"]
    monkeypatch.delenv("HF_TOKEN")
    if token is not None:
        monkeypatch.setenv("HF_TOKEN", token)
    code, _, err = evmamba("push", DIGITS, REPO_ID)
    assert code == 1 and err.count("\n") == 1
    for fragment in fragments:
        assert fragment in err
    assert hub.repos["model", REPO_ID].refs["main"] == before


def test_no_network(evmamba, hub, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    code, _, err = evmamba("push", DIGITS, REPO_ID)
    assert code == 1 and err.count("\n") == 1
    assert "http://127.0.0.1:9 cannot be reached" in err


@pytest.mark.parametrize(
    "phase, status, message",
    [
        ("info", 500, "is overloaded or fails"),
        ("create", 404, "answered 404"),
        ("create", 502, "is overloaded or fails"),
        ("commit", 404, "answered 404"),
        ("commit", 409, "another process changes it"),
        ("commit", 418, "answered 418"),
        ("commit", 504, "is overloaded or fails"),
    ],
)
def test_errors_of_the_hub(evmamba, hub, phase, status, message):
    hub.faults = [Fault(phase, status)]
    code, _, err = evmamba("push", DIGITS, REPO_ID)
    assert code == 1 and message in err.splitlines()[-1]
    assert "someone/digits" in err.splitlines()[-1]
    assert evmamba("push", DIGITS, REPO_ID)[0] == 0
    assert hub.repos["model", REPO_ID].history == [UPLOAD_MESSAGE, "initial commit"]


def test_words_of_the_hub_are_shown_without_the_token(evmamba, hub):
    hub.faults = [Fault("commit", 400, {"X_Error_Message": f"no such thing for {os.environ['HF_TOKEN']}"})]
    code, _, err = evmamba("push", DIGITS, REPO_ID)
    assert code == 1 and "answered 400" in err and "no such thing for (the access token)" in err


@pytest.mark.parametrize("phase", ["validate", "batch"])
def test_answers_that_are_not_of_a_hub(evmamba, hub, phase):
    hub.faults = [Fault(phase, "corrupt")]
    code, _, err = evmamba("push", DIGITS, REPO_ID)
    assert code == 1 and "rejects the upload to someone/digits" in err


def damage(name: str, content: bytes | None):
    def apply(model_dir: Path) -> None:
        (model_dir / name).unlink() if content is None else (model_dir / name).write_bytes(content)

    return apply


def truncate_weights(model_dir: Path) -> None:
    path = model_dir / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def pickle_weights(model_dir: Path) -> None:
    torch.save(load_file(model_dir / "model.safetensors"), model_dir / "pytorch_model.bin")
    (model_dir / "model.safetensors").unlink()


def lose_a_tensor(model_dir: Path) -> None:
    tensors = load_file(model_dir / "model.safetensors")
    del tensors["classifier.weight"]
    save_file(tensors, model_dir / "model.safetensors")


def lose_a_shard(model_dir: Path) -> None:
    (model_dir / "model.safetensors").unlink()
    index = {"weight_map": {"classifier.weight": "model-00001-of-00002.safetensors"}}
    (model_dir / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    "spoil, fragments",
    [
        (shutil.rmtree, ["is not a directory", "`save_pretrained`"]),
        (damage("config.json", None), ["holds no config.json", "`save_pretrained`"]),
        (damage("config.json", b"{"), ["config.json is missing or damaged"]),
        (damage("config.json", b'{"model_type": "resnet"}'), ["of the type 'resnet'"]),
        (damage("config.json", b'{"model_type": "efficientvmamba", "depths": [0]}'), ["missing or damaged", "depths"]),
        (damage("config.json", b'{"model_type": "efficientvmamba"}'), ["names the architecture None"]),
        (damage("preprocessor_config.json", None), ["no preprocessor_config.json", "image processor"]),
        (damage("model.safetensors", None), ["no model.safetensors"]),
        (damage("README.md", b"---\na: [\n---\n"), ["the metadata of", "README.md cannot be read"]),
        (truncate_weights, ["model.safetensors is damaged"]),
        (pickle_weights, ["no model.safetensors", "pickles are not read"]),
        (lose_a_tensor, ["1 tensors are missing", "classifier.weight"]),
        (lose_a_shard, ["lacks model-00001-of-00002.safetensors"]),
    ],
)
def test_incomplete_folders(evmamba, hub, model_dir, spoil, fragments):
    spoil(model_dir)
    for options in ([], ["--dry-run"]):
        code, out, err = evmamba("push", model_dir, REPO_ID, *options)
        assert (code, out) == (1, "")
        assert err.startswith("Error: ")
        for fragment in fragments:
            assert fragment in err
    assert hub.requests == []


def test_a_card_whose_examples_load_another_model_is_announced(evmamba, hub, model_dir):
    """As after `evmamba train --name`, or in a copy of somebody's repository."""
    card = model_dir / "README.md"
    text = card.read_text(encoding="utf-8")
    assert text.count('"demo/digits"') == 5
    for options in ([], ["--dry-run"]):
        code, _, err = evmamba("push", model_dir, REPO_ID, *options)
        assert code == 0
        assert f"the examples in the card load demo/digits: put {REPO_ID} there" in err
    for fitting in (text.replace('"demo/digits"', f'"{REPO_ID}"'), "# Digits\n", ""):
        card.write_text(fitting, encoding="utf-8")
        assert "examples" not in evmamba("push", model_dir, REPO_ID, "--dry-run")[2]


def test_details_where_there_is_a_card(evmamba, hub):
    code, _, err = evmamba("push", DIGITS, REPO_ID, "--license", "mit")
    assert code == 1 and "is the card already" in err


# Interruptions


def push_in_a_fork(model_dir: Path) -> int:
    """Start a push in a separate process, with the libraries imported. Return the id of the process."""
    pid = os.fork()
    if pid == 0:
        sys.argv = ["evmamba", "push", str(model_dir), REPO_ID]
        try:
            main()
        finally:
            os._exit(0)
    return pid


@pytest.mark.parametrize(
    "phase, exists",
    [*((phase, False) for phase in PHASES), *((phase, True) for phase in PHASES if phase != "create")],
)
def test_a_push_that_is_killed(evmamba, hub, model_dir, phase, exists):
    if exists:
        assert evmamba("push", model_dir, REPO_ID)[0] == 0
        old_commit, old_files = hub.repos["model", REPO_ID].refs["main"], hub.repos["model", REPO_ID].files()
        change_weights(model_dir)
        (model_dir / "README.md").write_text("---\nlicense: mit\n---\nNew\n")

    hub.faults = [Fault(phase, lambda: os.kill(child, signal.SIGKILL))]
    child = push_in_a_fork(model_dir)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    if exists and phase != "commit":  # the Hub makes a commit that was sent completely, even if the client is dead
        assert hub.repos["model", REPO_ID].refs["main"] == old_commit
        assert hub.repos["model", REPO_ID].files() == old_files

    assert evmamba("push", model_dir, REPO_ID)[0] == 0
    repo = hub.repos["model", REPO_ID]
    assert repo.history == [UPLOAD_MESSAGE] * (2 if exists else 1) + ["initial commit"]
    assert repo.files()["model.safetensors"] == (model_dir / "model.safetensors").read_bytes()
    assert repo.files()["README.md"] == (model_dir / "README.md").read_bytes()


@pytest.mark.parametrize(
    "phase, action",
    [
        *((phase, "hang up") for phase in PHASES),
        *((phase, "hang up after") for phase in ("create", "upload", "commit")),
    ],
)
def test_a_connection_that_breaks(evmamba, hub, phase, action):
    hub.faults = [Fault(phase, action)]
    code, _, err = evmamba("push", DIGITS, REPO_ID)
    # the client retries large files and the requests before them
    assert code == (0 if phase in ("preupload", "batch", "upload", "verify") else 1)
    if code:
        assert err.splitlines()[-1].startswith("Error: ") and "the connection was lost" in err
        assert evmamba("push", DIGITS, REPO_ID)[0] == 0
    repo = hub.repos["model", REPO_ID]
    assert repo.history == [UPLOAD_MESSAGE, "initial commit"]
    assert repo.files()["model.safetensors"] == (DIGITS / "model.safetensors").read_bytes()


@pytest.mark.parametrize(
    "phase, status",
    [
        ("info", 429),
        ("create", 503),
        ("create", 429),
        ("preupload", 429),
        ("upload", 503),
        ("commit", 429),
        ("commit", 503),
    ],
)
def test_a_busy_hub(evmamba, hub, phase, status):
    hub.faults = [Fault(phase, status, {"Retry_After": "0"})]
    code, _, err = evmamba("push", DIGITS, REPO_ID)
    assert code == 0, err
    assert hub.repos["model", REPO_ID].history == [UPLOAD_MESSAGE, "initial commit"]


def test_retry_after_is_respected(evmamba, hub):
    hub.faults = [Fault("commit", 503, {"Retry_After": "1"}, times=2)]
    start = time.monotonic()
    assert evmamba("push", DIGITS, REPO_ID)[0] == 0
    assert time.monotonic() - start > 2


def test_a_hub_that_stays_busy(evmamba, hub):
    hub.faults = [Fault("commit", 429, {"Retry_After": "0"}, times=100)]
    code, _, err = evmamba("push", DIGITS, REPO_ID)
    assert code == 1 and "answered 429" in err and "run the command again later" in err
    assert hub.phases().count("commit") == 5
