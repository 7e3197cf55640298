"""`evmamba push-space --static` with small ONNX files."""

import base64
import hashlib
import json
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import yaml
from onnx import TensorProto, helper, numpy_helper

from evmamba_hub.export.activation_maps import add_activation_maps
from hub_server import USERS


SPACE, MODEL = "someone/page", "someone/model"
PAGE = {"index.html", "page.js", "worker.js", "service-worker.js", "runtime.json"}
DIGITS = {f"examples/digit_{digit}.png" for digit in range(10)}


def create_onnx(dtype: int = TensorProto.FLOAT) -> bytes:
    """A mean over the cells and a linear layer, as the head of the network."""
    random = np.random.default_rng(0)
    numpy_type = helper.tensor_dtype_to_np_dtype(dtype)
    weight, bias = (random.standard_normal(shape).astype(numpy_type) for shape in ((5, 3), (5,)))
    graph = helper.make_graph(
        [
            helper.make_node("ReduceMean", ["pixel_values"], ["pooled"], axes=[2, 3], keepdims=0),
            helper.make_node("Gemm", ["pooled", "weight", "bias"], ["logits"], transB=1),
        ],
        "head",
        [helper.make_tensor_value_info("pixel_values", dtype, ["batch", 3, "height", "width"])],
        [helper.make_tensor_value_info("logits", dtype, ["batch", 5])],
        [numpy_helper.from_array(weight, "weight"), numpy_helper.from_array(bias, "bias")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    return model.SerializeToString()


@pytest.fixture
def model(tmp_path) -> Path:
    folder = tmp_path / "digits"
    (folder / "onnx").mkdir(parents=True)
    (folder / "onnx" / "model.onnx").write_bytes(create_onnx())
    (folder / "onnx" / "model_fp16.onnx").write_bytes(create_onnx(TensorProto.FLOAT16))
    (folder / "config.json").write_text(json.dumps({"id2label": {str(idx): str(idx) for idx in range(5)}}))
    (folder / "preprocessor_config.json").write_text("{}")
    return folder


@pytest.fixture
def runtime(tmp_path, monkeypatch) -> Path:
    """A directory of small files, and a page whose settings have their hashes."""
    folder = tmp_path / "dist"
    folder.mkdir()
    settings = {"version": "9.9.9", "url": "https://runtime/", "files": {}}
    for name in ("ort.mjs", "ort.wasm"):
        (folder / name).write_bytes(name.encode())
        digest = hashlib.sha384(name.encode()).digest()
        settings["files"][name] = f"sha384-{base64.b64encode(digest).decode()}"
    (tmp_path / "runtime.json").write_text(json.dumps(settings))
    from evmamba_demo import bundled

    page = bundled.find_page_files() | {"runtime.json": tmp_path / "runtime.json"}
    monkeypatch.setattr(bundled, "find_page_files", lambda: page)
    return folder


def push(evmamba, model: Path | str, *options: object) -> tuple[int, str, str]:
    result = evmamba("push-space", SPACE, "--static", "--model", model, *options)
    assert not any(token in result[1] + result[2] for token in USERS)
    return result


def test_what_arrives(evmamba, hub, model):
    code, out, err = push(evmamba, model, "--private")
    assert code == 0, err
    repo = hub.repos["space", SPACE]
    assert (repo.sdk, repo.private, len(repo.history), repo.variables) == ("static", True, 2, {})
    assert f"{hub.endpoint}/" in out
    files = repo.files()
    settings = {"config.json", "preprocessor_config.json", "page.json", "README.md", ".gitattributes"}
    assert files.keys() == PAGE | DIGITS | settings | {"onnx/model.onnx", "onnx/model_fp16.onnx"}
    card = yaml.safe_load(files["README.md"].decode().split("---\n")[1])
    assert card["sdk"] == "static" and card["license"] == "apache-2.0" and "models" not in card
    assert card["custom_headers"] == {
        "cross-origin-embedder-policy": "require-corp",
        "cross-origin-opener-policy": "same-origin",
        "cross-origin-resource-policy": "cross-origin",
    }
    page = json.loads(files["page.json"])
    assert page["name"] == "digits" and page["model"] is None and set(page["examples"]) == DIGITS
    assert {dtype: entry["path"] for dtype, entry in page["onnx"].items()} == {
        "float32": "onnx/model.onnx",
        "float16": "onnx/model_fp16.onnx",
    }
    assert all(entry["size"] == len(files[entry["path"]]) for entry in page["onnx"].values())
    assert page["credits"] is None and page["runtime"] is None
    assert "no commit was made" in push(evmamba, model)[1]


def test_a_model_of_the_hub_is_linked(evmamba, hub, model):
    files = {path.relative_to(model).as_posix(): path.read_bytes() for path in model.rglob("*") if path.is_file()}
    hub.create(MODEL, files=files | {"model.safetensors": b"not loaded"})
    assert push(evmamba, MODEL)[0] == 0
    files = hub.repos["space", SPACE].files()
    assert yaml.safe_load(files["README.md"].decode().split("---\n")[1])["models"] == [MODEL]
    assert json.loads(files["page.json"])["model"] == MODEL
    assert "model.safetensors" not in files
    assert not any("resolve" in str(request) and "safetensors" in str(request) for request in hub.requests)


def test_files_of_an_earlier_model_are_deleted(evmamba, hub, model, runtime):
    (model / "config.json").write_text(json.dumps({"id2label": {"0": "cat"}}))
    assert push(evmamba, model, "--runtime", runtime)[0] == 0
    files = hub.repos["space", SPACE].files()
    assert {"examples/cat.jpg", "examples/README.txt", "vendor/ort.wasm"} <= files.keys()
    page = json.loads(files["page.json"])
    assert page["credits"] == "examples/README.txt" and page["runtime"] == "vendor/"
    assert "CC BY 2.0" in files["examples/README.txt"].decode()

    (model / "config.json").write_text(json.dumps({"id2label": {"0": "0"}}))
    (model / "onnx" / "model_fp16.onnx").unlink()
    assert push(evmamba, model)[0] == 0
    names = hub.repos["space", SPACE].files().keys()
    assert names.isdisjoint({"examples/cat.jpg", "examples/README.txt", "vendor/ort.wasm", "onnx/model_fp16.onnx"})
    assert names >= PAGE | DIGITS


def test_dry_run_and_save_to(evmamba, hub, model, tmp_path, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    code, out, _ = push(evmamba, model, "--dry-run")
    assert code == 0 and "onnx/model.onnx" in out and "sdk: static" in out
    assert "The upload deletes other files of these names: vendor/*, examples/*, onnx/*" in out
    assert push(evmamba, model, "--save-to", tmp_path / "new" / "page")[0] == 0
    written = {path.relative_to(tmp_path / "new" / "page").as_posix() for path in (tmp_path / "new").rglob("*.*")}
    assert written - {"."} == PAGE | DIGITS | {
        "README.md", "page.json", "config.json", "preprocessor_config.json", "onnx/model.onnx", "onnx/model_fp16.onnx"
    }  # fmt: skip
    code, _, err = push(evmamba, model, "--save-to", tmp_path / "new" / "page")
    assert code == 1 and "exists already" in err
    assert hub.requests == []


def test_save_to_writes_the_gradio_space_too(evmamba, hub, tmp_path):
    code, out, err = evmamba("push-space", SPACE, "--model", MODEL, "--save-to", tmp_path / "space")
    assert code == 0 and "Wrote" in out, err
    assert (tmp_path / "space" / "app.py").is_file() and hub.requests == []


def test_what_is_refused(evmamba, hub, model, runtime, tmp_path):
    (tmp_path / "plain").mkdir()
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    for name in ("config.json", "preprocessor_config.json"):
        (damaged / name).write_bytes((model / name).read_bytes())
    (damaged / "onnx").mkdir()
    (damaged / "onnx" / "model.onnx").write_bytes(b"\xff" * 100)
    other = tmp_path / "other"
    other.mkdir()
    (other / "ort.mjs").write_bytes(b"changed")
    for folder, options, message in [
        (tmp_path / "plain", (), "holds no config.json: write a directory of ONNX files with `evmamba export"),
        (tmp_path / "absent", (), "is neither a path nor a valid repository id"),
        (damaged, (), "model.onnx is damaged: export the model again"),
        (model, ("--folder", tmp_path), "--folder is a Gradio Space, and --static uploads another one"),
        (model, ("--runtime", tmp_path / "plain"), "holds no ort.mjs: give the directory `dist` of the npm package"),
        (model, ("--runtime", other), "ort.mjs is not that of onnxruntime-web 9.9.9: install this version with npm"),
    ]:
        code, _, err = push(evmamba, folder, *options)
        assert code == 1 and message in " ".join(err.split()), (message, err)
    code, _, err = evmamba("push-space", SPACE, "--model", MODEL, "--runtime", runtime)
    assert code == 1 and "--runtime is for pages that classify in the browser: add --static" in err
    assert ("space", SPACE) not in hub.repos


def test_a_hub_that_cannot_be_reached(evmamba, hub, model, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    code, _, err = push(evmamba, model)
    assert code == 1 and "is needed for someone/page: unset HF_HUB_OFFLINE" in " ".join(err.split())


@pytest.mark.parametrize("name", ["model.onnx", "model_fp16.onnx"])
def test_maps_leave_the_logits_as_they_are(model, name):
    file = model / "onnx" / name
    before = onnxruntime.InferenceSession(file.read_bytes())
    after = onnxruntime.InferenceSession(add_activation_maps(file))
    dtype = np.float16 if "fp16" in name else np.float32
    pixel_values = np.random.default_rng(0).standard_normal((2, 3, 7, 5)).astype(dtype)
    (expected,) = before.run(None, {"pixel_values": pixel_values})
    logits, maps = after.run(None, {"pixel_values": pixel_values})
    np.testing.assert_array_equal(logits, expected)
    assert maps.shape == (2, 5, 7, 5) and maps.dtype == np.float32
    bias = numpy_helper.to_array(onnx.load(file).graph.initializer[1])
    np.testing.assert_allclose(maps.mean(axis=(2, 3)) + bias, logits, atol=1e-6 if dtype == np.float32 else 5e-3)


def test_files_with_maps_or_another_head_stay_as_they_are(model):
    file = model / "onnx" / "model.onnx"
    with_maps = add_activation_maps(file)
    file.write_bytes(with_maps)
    assert add_activation_maps(file) == with_maps
    headless = onnx.load(file)
    headless.graph.node[1].op_type = "Other"
    file.write_bytes(headless.SerializeToString())
    assert add_activation_maps(file) == headless.SerializeToString()
