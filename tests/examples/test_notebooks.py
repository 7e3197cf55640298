"""The notebooks run from top to bottom in a fresh kernel, and show what their text says."""

import json
import os
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from nbformat import NotebookNode


EXAMPLES = Path(__file__).parents[2] / "examples"


def run(name: str, folder: Path, facts: str) -> tuple[NotebookNode, dict]:
    """Run a notebook in a fresh kernel. Raise the errors of its cells.

    Args:
        name: File without its suffix.
        folder: Directory to run in.
        facts: Expression of a dictionary, which is evaluated in the kernel after the last cell.

    Returns:
        The notebook with its outputs, and the dictionary.
    """
    notebook = nbformat.read(EXAMPLES / f"{name}.ipynb", as_version=4)
    notebook.cells.append(nbformat.v4.new_code_cell(f"import json\nprint(json.dumps({facts}))"))
    variables = {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1", "TMPDIR": str(folder)}
    client = NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(folder)}})
    client.execute(env=os.environ | variables)
    return notebook, json.loads(notebook.cells.pop().outputs[-1].text)


def count_pictures(notebook: NotebookNode) -> int:
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return sum("image/png" in output.get("data", {}) for output in outputs)


@pytest.mark.slow
def test_classify_and_look_inside(tmp_path):
    facts = """{
        "label": predictions[0]["label"],
        "scores": [predictions[0]["score"], logits.softmax(0)[label].item()],
        "logit": [logits[3].item(), (maps["3"].sum() + model.classifier.bias[3]).item()],
        "halves": [maps["3"].gt(0).float().mean().item(), maps["8"][:, 1].max().item()],
        "visited": [len(visited), sum(map(len, paths))],
    }"""
    notebook, found = run("classify_and_look_inside", tmp_path, facts)
    assert found["label"] == "3"
    assert found["scores"][0] == pytest.approx(found["scores"][1], abs=1e-5) and found["scores"][0] > 0.9
    assert found["logit"][0] == pytest.approx(found["logit"][1], abs=1e-4)
    assert found["halves"][0] > 0.5 and found["halves"][1] < 0
    assert found["visited"] == [64, 64]
    assert count_pictures(notebook) == 5


@pytest.mark.slow
def test_fine_tune_with_trainer(tmp_path):
    facts = '{"accuracy": [before, after], "label": predictions[0]["label"], "names": model.config.id2label}'
    notebook, found = run("fine_tune_with_trainer", tmp_path, facts)
    before, after = found["accuracy"]
    assert before < 0.5 and after > 0.9
    assert found["names"] == {"0": "hexagon", "1": "square", "2": "triangle"}
    assert found["label"] == "triangle"
    assert count_pictures(notebook) == 1


@pytest.mark.slow
def test_lora_with_peft(tmp_path):
    facts = """{
        "accuracy": [before, after],
        "differences": [difference_reloaded, difference_merged],
        "batch norms": len(batch_norms),
        "adapted": sorted({name.split(".")[-2] for name, _ in adapted.named_modules() if name.endswith("lora_A")}),
        "merged": type(merged).__name__,
    }"""
    notebook, found = run("lora_with_peft", tmp_path, facts)
    before, after = found["accuracy"]
    assert before < 0.2 and after > 0.9
    assert found["differences"][0] == 0 and found["differences"][1] < 1e-4
    assert found["batch norms"] == 8
    linear = "expand expand_conv in_proj output_proj pointwise_conv project_conv reduction squeeze"
    assert found["adapted"] == linear.split()
    assert found["merged"] == "EfficientVMambaForImageClassification"
    assert count_pictures(notebook) == 1


@pytest.mark.slow
def test_export_and_run_onnx(tmp_path):
    facts = """{
        "labels": predictions,
        "differences": [difference, *report.differences.values()],
        "milliseconds": milliseconds,
        "bytes": file.stat().st_size,
    }"""
    _, found = run("export_and_run_onnx", tmp_path, facts)
    assert found["labels"] == list("0123456789")
    assert max(found["differences"]) < 1e-4
    assert min(found["milliseconds"].values()) > 0 and len(found["milliseconds"]) == 3
    assert found["bytes"] > 100_000
