"""`evmamba convert` with repositories on the Hub."""

import re

import pytest
import torch
from huggingface_hub import constants

from evmamba_hub.convert.convert import choose_checkpoint
from evmamba_hub.errors import UserError
from hub_server import WRITE_TOKEN, Fault
from original_checkpoints import assert_golden, assert_refused, micro


@pytest.mark.parametrize(
    "files, wanted, expected",
    [
        ([".gitattributes", "README.md", "tiny.pth"], None, "tiny.pth"),
        (["README.md", "weights/tiny.pth.tar"], None, "weights/tiny.pth.tar"),
        (["config.json", "tiny.safetensors"], None, "tiny.safetensors"),
        (["a.pth", "b.pth"], "b.pth", "b.pth"),
        (["a.ckpt"], "a.ckpt", "a.ckpt"),
    ],
)
def test_choice_of_the_file(files, wanted, expected):
    assert choose_checkpoint("someone/tiny", files, wanted) == expected


@pytest.mark.parametrize(
    "files, wanted, message",
    [
        (["README.md", "code.tar"], None, "someone/tiny holds no checkpoint"),
        (["a.pth", "b.safetensors"], None, "choose one with --file: a.pth, b.safetensors"),
        (["a.pth"], "c.pth", "someone/tiny holds no file c.pth: choose one of a.pth"),
    ],
)
def test_no_choice_of_the_file(files, wanted, message):
    with pytest.raises(UserError, match=re.escape(message)):
        choose_checkpoint("someone/tiny", files, wanted)


def checkpoint_bytes(tmp_path, state_dict) -> bytes:
    torch.save({"model_ema": state_dict}, tmp_path / "source.pth")
    return (tmp_path / "source.pth").read_bytes()


@pytest.mark.parametrize(
    "names, options", [(["micro.pth.tar"], []), (["raw.pth", "weights/micro.pth"], ["--file", "weights/micro.pth"])]
)
def test_repository_on_the_hub(evmamba, hub, tmp_path, names, options):
    files = dict.fromkeys(["README.md", *names], b"else")
    hub.create("someone/micro", {**files, names[-1]: checkpoint_bytes(tmp_path, micro())})
    code, out, _ = evmamba("convert", "someone/micro", tmp_path / "converted", *options)
    assert code == 0 and "Converted someone/micro\n" in out and re.search("weights +ema", out)
    assert_golden(tmp_path / "converted")


@pytest.mark.parametrize(
    "repo_id, fragments",
    [
        ("someone/else", ["someone/else is neither a path here nor a repository on the Hub", "`hf auth login`"]),
        ("else/gated", ["else/gated is gated: accept its conditions", "`hf auth login`"]),
        ("someone/several", ["choose one with --file: a.pth, b.pth"]),
        ("someone/truncated", ["tiny.pth cannot be read"]),
    ],
)
def test_trouble_with_the_hub(evmamba, hub, tmp_path, repo_id, fragments):
    hub.create("else/gated", gated=True)
    hub.create("someone/several", {"a.pth": b"", "b.pth": b""})
    hub.create("someone/truncated", {"tiny.pth": checkpoint_bytes(tmp_path, micro())[:-100]})
    result = evmamba("convert", repo_id, tmp_path / "converted")
    assert WRITE_TOKEN not in "".join(result[1:])
    assert_refused(result, tmp_path, *fragments)


def test_a_damaged_download(evmamba, hub, tmp_path):
    hub.create("someone/damaged", {"tiny.pth": checkpoint_bytes(tmp_path, micro())})
    hub.faults = [Fault("download", "corrupt")]
    result = evmamba("convert", "someone/damaged", tmp_path / "converted")
    assert_refused(result, tmp_path, "tiny.pth was damaged on its way", "run the command again")
    assert evmamba("convert", "someone/damaged", tmp_path / "converted")[0] == 0


def test_no_connection(evmamba, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # as HF_ENDPOINT does at import
    result = evmamba("convert", "TerryPei/EfficientVMamba-Tiny", "converted")
    assert "hf_secret" not in result[2]
    assert_refused(
        result,
        tmp_path,
        "there is no file or directory TerryPei/EfficientVMamba-Tiny, and http://127.0.0.1:9 cannot be reached for "
        "TerryPei/EfficientVMamba-Tiny",
        "check the path or the connection",
    )
