"""`evmamba convert` with repositories on the Hub."""

import os
import re
import subprocess
import sys

import pytest
import torch

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


def test_no_connection(tmp_path):
    """The Hub's client reads its endpoint at import, so the command runs in a separate process."""
    environment = {**os.environ, "HF_ENDPOINT": "http://127.0.0.1:9", "HF_TOKEN": "hf_secret"}
    process = subprocess.run(
        [sys.executable, "-m", "evmamba_hub.cli", "convert", "TerryPei/EfficientVMamba-Tiny", "converted"],
        cwd=tmp_path,
        env={**environment, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert "hf_secret" not in process.stderr
    result = process.returncode, process.stdout, process.stderr
    assert_refused(
        result,
        tmp_path,
        "there is no file or directory TerryPei/EfficientVMamba-Tiny, and http://127.0.0.1:9 cannot be reached for "
        "TerryPei/EfficientVMamba-Tiny",
        "check the path or the connection",
    )
