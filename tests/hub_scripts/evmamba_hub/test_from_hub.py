"""Load models from the Hub, and weights from other programs, in every way that `from_pretrained` offers."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from uuid import uuid4

import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset
from huggingface_hub import HfApi, constants
from safetensors.torch import load_file
from transformers import AutoModelForImageClassification, Trainer, TrainingArguments

from hub_server import Fault, HubServer
from modeling_evmamba import EfficientVMambaBackbone, EfficientVMambaConfig, EfficientVMambaForImageClassification
from weights import assert_same_weights


DIGITS = Path(__file__).parents[3] / "demo" / "digits"
EXAMPLES = DIGITS.parent / "examples"


@pytest.fixture
def repo_id(hub: HubServer, tmp_path) -> str:
    """A repository of two commits. Its unique name keeps it out of the cache."""
    repo_id = f"someone/{uuid4().hex}"
    model = EfficientVMambaForImageClassification.from_pretrained(DIGITS)
    model.classifier.bias.data.fill_(1.0)
    model.save_pretrained(tmp_path / "old")
    api = HfApi()
    api.create_repo(repo_id)
    api.upload_folder(repo_id=repo_id, folder_path=tmp_path / "old")
    api.create_branch(repo_id, branch="old")
    api.upload_folder(repo_id=repo_id, folder_path=DIGITS)
    hub.requests.clear()
    return repo_id


def digits() -> EfficientVMambaForImageClassification:
    return EfficientVMambaForImageClassification.from_pretrained(DIGITS)


def test_revisions(hub, repo_id):
    assert_same_weights(AutoModelForImageClassification.from_pretrained(repo_id).state_dict(), digits().state_dict())
    old = AutoModelForImageClassification.from_pretrained(repo_id, revision="old")
    assert old.classifier.bias.eq(1).all()
    commit = hub.repos["model", repo_id].refs["old"]
    old = AutoModelForImageClassification.from_pretrained(repo_id, revision=commit)
    assert old.classifier.bias.eq(1).all()
    with pytest.raises(OSError, match="nowhere"):
        AutoModelForImageClassification.from_pretrained(repo_id, revision="nowhere")


def test_the_cache(hub, repo_id):
    for _ in range(2):
        AutoModelForImageClassification.from_pretrained(repo_id)
    assert hub.phases().count("download") == 1


@pytest.mark.parametrize("variable", ["HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"])
def test_offline_after_one_download(hub, repo_id, variable):
    """The Hub's client reads HF_HUB_OFFLINE at import, so the code runs in separate processes."""
    AutoModelForImageClassification.from_pretrained(repo_id)
    hub.requests.clear()
    script = (
        "import sys, torch, modeling_evmamba; from transformers import AutoModelForImageClassification as A; "
        "from evmamba_hub.client import fetch_model; from evmamba_hub.errors import UserError\n"
        "print(A.from_pretrained(sys.argv[1]).classifier.bias.tolist(), fetch_model(sys.argv[1]).is_dir())\n"
        "from evmamba_hub.convert.convert import download; from evmamba_hub.publish.push import push_model\n"
        "for call in (lambda: fetch_model('someone/never'), lambda: download('someone/never', None),\n"
        "             lambda: push_model('someone/never', {}, message='')):\n"
        "    try: call()\n    except UserError as error: print(error)"
    )
    completed = subprocess.run(
        [sys.executable, "-c", script, repo_id],
        env={**os.environ, variable: "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert completed.returncode == 0, completed.stderr
    loaded, *messages = completed.stdout.splitlines()
    assert loaded == f"{digits().classifier.bias.tolist()} True"
    no_path = "there is no file or directory someone/never, and "
    unset = "unset HF_HUB_OFFLINE and TRANSFORMERS_OFFLINE"
    assert messages == [
        f"{no_path}someone/never is not in the cache: {unset} to download it",
        f"{no_path}{hub.endpoint} is needed for someone/never: {unset} to reach it",
        f"{hub.endpoint} is needed for someone/never: {unset} to reach it",
    ]
    assert hub.requests == []


@pytest.mark.parametrize(
    "arguments",
    [
        ("classify", EXAMPLES, "--model", "no-such-thing"),
        ("evaluate", "no-such-thing", "--dataset", DIGITS),
        ("evaluate", DIGITS, "--dataset", "no-such-thing"),
        ("train", "--dataset", "no-such-thing", "--variant", "tiny", "--output-dir", "run"),
        ("train", "--model", "no-such-thing", "--dataset", DIGITS, "--output-dir", "run"),
    ],
    ids=lambda arguments: " ".join(map(str, arguments[:2])),
)
def test_a_path_that_does_not_exist_without_a_connection(evmamba, hub, monkeypatch, tmp_path, arguments):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    code, _, err = evmamba(*arguments)
    assert code == 1 and err.splitlines()[-1].startswith(
        "Error: there is no file or directory no-such-thing, and http"
    )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "model, repo_id",
    [
        ("efficientvmamba-tiny", "TerryPei/EfficientVMamba-Tiny"),
        ("./efficientvmamba-small/", "TerryPei/EfficientVMamba-Small"),
        ("some/where/EfficientVMamba-Base", "TerryPei/EfficientVMamba-Base"),
        ("tiny", "TerryPei/EfficientVMamba-Tiny"),
    ],
)
def test_weights_that_are_not_converted_yet(evmamba, hub, model, repo_id):
    for arguments in [("classify", EXAMPLES, "--model", model), ("info", model)]:
        code, _, err = evmamba(*arguments)
        assert code == 1 and err == (
            f"Error: there is no directory {model}: convert the authors' weights first with `evmamba convert "
            f"{repo_id} {model}`\n"
        )
    assert hub.requests == []


@pytest.mark.parametrize(
    "name, meant, is_connected",
    [
        ("flowrs", "flowers", False),
        ("Flowers", "flowers", False),
        ("data/flower", "data/flowers", False),
        ("data/flower", "data/flowers", True),
        ("./flowrs", "flowers", True),
    ],
)
def test_a_misspelled_directory(evmamba, hub, monkeypatch, tmp_path, name, meant, is_connected):
    monkeypatch.chdir(tmp_path)
    for directory in ("flowers", "data/flowers"):
        (tmp_path / directory).mkdir(parents=True)
    (tmp_path / "flowrs.json").touch()
    if not is_connected:
        monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    for arguments in [("evaluate", DIGITS, "--dataset", name), ("classify", EXAMPLES, "--model", name)]:
        code, _, err = evmamba(*arguments)
        assert code == 1 and f"(did you mean {meant}?)" in err and name in err


def test_a_path_to_upload_to_is_none(evmamba, hub, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert evmamba("push", DIGITS, "someone/digits")[2].startswith("Error: http://127.0.0.1:9 cannot be reached for")


def test_shards(hub, tmp_path):
    digits().save_pretrained(tmp_path, max_shard_size="200KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    hub.create("someone/sharded", {path.name: path.read_bytes() for path in tmp_path.iterdir()})
    for model in (tmp_path, "someone/sharded"):
        assert_same_weights(AutoModelForImageClassification.from_pretrained(model).state_dict(), digits().state_dict())


def test_subfolder(hub):
    files = {f"models/digits/{path.name}": path.read_bytes() for path in DIGITS.iterdir()}
    hub.create("someone/collection", files)
    model = AutoModelForImageClassification.from_pretrained("someone/collection", subfolder="models/digits")
    assert_same_weights(model.state_dict(), digits().state_dict())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtype(repo_id, dtype):
    model = AutoModelForImageClassification.from_pretrained(repo_id, dtype=dtype)
    others = {name.rpartition(".")[2] for name, tensor in model.named_parameters() if tensor.dtype != dtype}
    assert others == (set() if dtype == torch.float64 else {"A_log", "D"})  # float32 at least
    with torch.no_grad():
        image = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
        logits = model(image.to(dtype)).logits
        assert logits.dtype == dtype
        torch.testing.assert_close(logits.float(), digits()(image).logits, atol=0.2, rtol=0.05)


def test_device_map(repo_id):
    model = AutoModelForImageClassification.from_pretrained(repo_id, device_map="auto")
    assert_same_weights(model.state_dict(), digits().state_dict())


def test_blocks_are_not_split_between_devices(tmp_path):
    """Memory holds a part of the network. The rest is offloaded to the disk."""
    model = AutoModelForImageClassification.from_pretrained(
        DIGITS, device_map="auto", max_memory={"cpu": 250_000}, offload_folder=str(tmp_path)
    )
    assert set(model.hf_device_map.values()) == {"cpu", "disk"}
    assert not any(".layers.0." in name for name in model.hf_device_map)
    image = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(model(image).logits, digits()(image).logits)


def test_backbone_of_a_classifier(repo_id):
    backbone = EfficientVMambaBackbone.from_pretrained(repo_id, out_features=["stage1", "stage3"])
    weights = digits().efficientvmamba.state_dict()
    for name, tensor in backbone.state_dict().items():
        if name.startswith(("embeddings.", "encoder.")):
            assert torch.equal(tensor, weights[name])
    assert [feature_map.shape[1] for feature_map in backbone(torch.randn(1, 3, 32, 32)).feature_maps] == [16, 48]


def test_classify(evmamba, hub, repo_id):
    code, out, err = evmamba("classify", EXAMPLES, "--model", repo_id, "--json", "--top-k", "1")
    assert code == 0, err
    for entry in json.loads(out):
        assert entry["predictions"][0]["label"] == Path(entry["image"]).stem[-1]
    code, _, err = evmamba("classify", EXAMPLES, "--model", "someone/nothing")
    assert code == 1 and "someone/nothing is neither a path here nor a repository on the Hub" in err


def test_classify_at_a_revision(evmamba, repo_id):
    _, new, _ = evmamba("classify", EXAMPLES, "--model", repo_id, "--json")
    code, old, err = evmamba("classify", EXAMPLES, "--model", repo_id, "--json", "--revision", "main")
    assert code == 0 and old == new, err
    code, _, err = evmamba("classify", EXAMPLES, "--model", repo_id, "--revision", "nowhere")
    assert code == 1 and "has no such revision" in err


# Damaged downloads and errors of the Hub


@pytest.mark.parametrize("phase", ["download", "resolve"])
def test_a_download_that_was_changed_on_its_way(evmamba, hub, repo_id, phase):
    """The file has the right size, but wrong bytes."""
    hub.faults = [Fault(phase, "corrupt", times=3)]
    code, _, err = evmamba("classify", EXAMPLES, "--model", repo_id)
    assert code == 1 and "was damaged on its way" in err and "run the command again" in err
    hub.faults = []
    assert evmamba("classify", EXAMPLES, "--model", repo_id)[0] == 0


def test_a_download_that_breaks_off_is_resumed(evmamba, hub, repo_id):
    hub.faults = [Fault("download", "truncate")]
    assert evmamba("classify", EXAMPLES, "--model", repo_id)[0] == 0
    assert hub.phases().count("download") == 2


# Weights that others saved


@pytest.fixture
def trained(tmp_path) -> tuple[Path, EfficientVMambaForImageClassification]:
    """Train two steps with transformers' Trainer."""
    config = EfficientVMambaConfig.from_pretrained(DIGITS)
    model = EfficientVMambaForImageClassification(config)
    rows = {"pixel_values": torch.randn(8, 3, 32, 32).tolist(), "labels": [0, 1] * 4}
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "trainer"), max_steps=2, per_device_train_batch_size=4, report_to=[], use_cpu=True
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=Dataset.from_dict(rows).with_format("torch"))
    trainer.train()
    trainer.save_model(tmp_path / "trained")
    return tmp_path / "trained", trainer.model


def test_weights_of_the_trainer(evmamba, hub, trained):
    folder, model = trained
    assert (folder / "training_args.bin").is_file()
    assert_same_weights(AutoModelForImageClassification.from_pretrained(folder).state_dict(), model.state_dict())
    shutil.copy(DIGITS / "preprocessor_config.json", folder)
    assert evmamba("push", folder, "someone/trained")[0] == 0
    assert not any(name.endswith(".bin") for name in hub.repos["model", "someone/trained"].files())
    assert_same_weights(
        AutoModelForImageClassification.from_pretrained("someone/trained").state_dict(), model.state_dict()
    )


@pytest.mark.parametrize("options", [{}, {"max_shard_size": "200KB"}], ids=["one file", "shards"])
def test_weights_of_accelerate(tmp_path, options):
    accelerator = Accelerator(cpu=True)
    model = accelerator.prepare(digits())
    accelerator.save_model(model, tmp_path, **options)
    digits().config.save_pretrained(tmp_path)
    expected = load_file(DIGITS / "model.safetensors")
    assert_same_weights(AutoModelForImageClassification.from_pretrained(tmp_path).state_dict(), expected)
