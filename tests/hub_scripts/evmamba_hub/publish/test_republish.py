"""`evmamba convert --push-to` and `evmamba republish`: from the authors' checkpoints to repositories with cards."""

import re

import pytest
import torch
import yaml
from transformers import AutoConfig

from evmamba_hub.cli.uploads import UPLOAD_MESSAGE
from evmamba_hub.info import find_variant
from evmamba_hub.publish.republish import load_manifest
from golden_values import original_state_dict
from hub_server import USERS, Fault, HubServer
from modeling_evmamba import VARIANTS


TINY = "TerryPei/EfficientVMamba-Tiny"


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> dict[str, bytes]:
    """The checkpoints of the authors' repositories, with other weights."""
    contents = {}
    for variant in VARIANTS:
        path = tmp_path_factory.mktemp("checkpoints") / f"{variant}.pth"
        state_dict = {name: tensor.half() for name, tensor in original_state_dict(variant, 11).items()}
        torch.save({"model_ema": state_dict, "epoch": 299}, path)
        contents[variant] = path.read_bytes()
    return contents


@pytest.fixture
def authors(hub, checkpoints) -> HubServer:
    for checkpoint in load_manifest():
        name = f"efficient_vmamba_{checkpoint.variant}.ckpt"
        hub.create(checkpoint.source, {name: checkpoints[checkpoint.variant], "README.md": b"No card"})
    return hub


def test_the_manifest():
    manifest = load_manifest()
    assert [checkpoint.variant for checkpoint in manifest] == list(VARIANTS)
    assert [checkpoint.top1 for checkpoint in manifest] == [76.5, 78.7, 81.8]
    for checkpoint in manifest:
        assert checkpoint.log.startswith("https://github.com/TerryPei/EfficientVMamba/")
        assert checkpoint.source.startswith("TerryPei/EfficientVMamba-")
    assert ["1024" in checkpoint.details.training for checkpoint in manifest] == [False, False, True]


def test_republish(evmamba, authors):
    code, out, err = evmamba("republish", "someone", "--dry-run")
    assert code == 0, err
    assert [kind for kind, repo_id in authors.repos if repo_id.startswith("someone/")] == []
    assert len(re.findall(r"│ model\.safetensors +│", out)) == out.count("The upload deletes") == 3

    code, out, err = evmamba("republish", "someone")
    assert code == 0, err
    assert out.count("Uploaded") == 3
    for checkpoint in load_manifest():
        repo = authors.repos["model", f"someone/{checkpoint.name}"]
        assert repo.history == [UPLOAD_MESSAGE, "initial commit"]
        files = repo.files()
        card = files["README.md"].decode()
        assert f"someone/{checkpoint.name}" in card and checkpoint.log in card and "These are the averaged" in card
        (entry,) = yaml.safe_load(files[".eval_results/imagenet-1k.yaml"])
        assert entry["value"] == checkpoint.top1 and entry["source"]["url"] == checkpoint.log
        assert not any(token in card for token in USERS)
        config = AutoConfig.from_pretrained(f"someone/{checkpoint.name}")
        assert find_variant(config) == checkpoint.variant and config.id2label[0] == "tench, Tinca tinca"


def test_convert_and_push(evmamba, authors):
    code, out, err = evmamba("convert", TINY, "--push-to", "someone/tiny", "--private")
    assert code == 0, err
    assert re.search(r"variant +tiny\n", out) and "Uploaded" in out and "written to" not in out
    repo = authors.repos["model", "someone/tiny"]
    assert repo.private and repo.history == [UPLOAD_MESSAGE, "initial commit"]
    assert "76.5" in repo.files()[".eval_results/imagenet-1k.yaml"].decode()


def test_the_push_that_fails_after_a_conversion(evmamba, authors, tmp_path):
    authors.faults = [Fault("commit", "hang up")]
    code, out, err = evmamba("convert", TINY, tmp_path / "tiny", "--push-to", "someone/tiny")
    assert code == 1 and "Converted" in out
    assert f"Run `evmamba push {tmp_path / 'tiny'} someone/tiny` to upload the converted model" in err
    assert evmamba("push", tmp_path / "tiny", "someone/tiny")[0] == 0
    assert "76.5" in authors.repos["model", "someone/tiny"].files()[".eval_results/imagenet-1k.yaml"].decode()


def test_a_file_of_ones_own_has_a_card_without_accuracy(evmamba, authors, checkpoints, tmp_path):
    (tmp_path / "own.pth").write_bytes(checkpoints["tiny"])
    assert evmamba("convert", tmp_path / "own.pth", "--push-to", "someone/own")[0] == 0
    files = authors.repos["model", "someone/own"].files()
    assert ".eval_results/imagenet-1k.yaml" not in files
    assert b"model-index" not in files["README.md"] and b"license" not in files["README.md"]


def test_a_checkpoint_that_is_not_what_the_manifest_says(evmamba, hub, checkpoints):
    hub.create(TINY, {"model.pth": checkpoints["small"]})
    code, _, err = evmamba("convert", TINY, "--push-to", "someone/tiny")
    assert code == 1 and "holds small, but the manifest names tiny" in err
    assert ("model", "someone/tiny") not in hub.repos


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["convert", TINY], "give a directory to write, --push-to with a repository, or both"),
        (["convert", TINY, "--push-to", "no id"], "is not a valid repository id"),
        (["republish", "a/b"], "is not a valid repository id"),
        (["republish", "someone"], "neither a path here nor a repository"),
    ],
)
def test_bad_arguments(evmamba, hub, arguments, message):
    code, _, err = evmamba(*arguments)
    assert code == 1 and message in err
