"""The network's code in a repository, loaded with `trust_remote_code=True` without this package installed."""

import json
import os
import subprocess
import sys
import venv
from pathlib import Path

import pytest
import torch
import transformers
from packaging.version import Version
from PIL import Image
from transformers import AutoConfig, AutoModelForImageClassification, pipeline
from transformers.dynamic_module_utils import get_imports, get_relative_imports
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from dense_heads import find_backbone
from dense_models import DETECTOR, SEGMENTER, save_dense_model
from evmamba_hub.publish.bundle import find_remote_code
from evmamba_hub.publish.push import collect_model_files
from linked_environments import find_requirements, link_distributions
from modeling_evmamba import EfficientVMambaBackbone, EfficientVMambaConfig, EfficientVMambaForImageClassification


ROOT = Path(__file__).parents[4]
DIGITS = ROOT / "demo" / "digits"
EXAMPLE = ROOT / "demo" / "examples" / "digit_3.png"

# Use the repository in every way without this package. Print the results as JSON.
SCRIPT = """
import json, sys
from importlib.util import find_spec
from pathlib import Path

import torch
from PIL import Image
from transformers import AutoBackbone, AutoConfig, AutoModel, AutoModelForImageClassification, pipeline
from transformers.models.auto.image_processing_auto import AutoImageProcessor

PACKAGES = ["torchvision", "numba", "triton", "modeling_evmamba", "evmamba_kernels", "evmamba_hub"]
repo_id, other_repo_id, example = sys.argv[1:]
options = {"trust_remote_code": True}
config = AutoConfig.from_pretrained(repo_id, **options)
model = AutoModelForImageClassification.from_pretrained(repo_id, **options)
inputs = AutoImageProcessor.from_pretrained(repo_id)(Image.open(example).convert("RGB"), return_tensors="pt")
backbone = AutoBackbone.from_pretrained(repo_id, out_features=["stage1", "stage4"], **options)
other = AutoModelForImageClassification.from_pretrained(other_repo_id, **options)

with torch.no_grad(), torch.profiler.profile() as profile:
    logits = model(**inputs).logits
with torch.no_grad():
    other_logits = other(**inputs).logits
    hidden_states = AutoModel.from_pretrained(repo_id, **options)(**inputs).last_hidden_state
    shapes = [feature_map.shape for feature_map in backbone(**inputs).feature_maps]
loss = model(**inputs, labels=torch.tensor([3])).loss
loss.backward()

operator = sys.modules[type(model).__module__].atrous_selective_scan
backends = sys.modules[operator.__module__.rpartition(".")[0] + ".backends"]
print(json.dumps({
    "installed": [name for name in PACKAGES if find_spec(name)],
    "files": sorted(path.name for path in Path(sys.modules[type(model).__module__].__file__).parent.glob("*.py")),
    "modules": [type(config).__module__, type(model).__module__, operator.__module__],
    "logits": logits.tolist(),
    "other_logits": other_logits.tolist(),
    "hidden_states": list(hidden_states.shape),
    "feature_maps": shapes,
    "gradient": model.classifier.weight.grad.norm().item(),
    "label": pipeline("image-classification", model=repo_id, **options)(example)[0]["label"],
    "backend": backends.choose_backend("cpu", torch.float32).backend,
    "usable": [name for name in backends.BACKENDS if backends.why_not(name, "cpu", torch.float32) is None],
    "operators": [event.key for event in profile.key_averages() if event.key.startswith("transformers_modules")],
}))
"""


# Run pipelines of heads without this package. Save one head again, and load what was saved.
HEADS_SCRIPT = """
import json, sys
from importlib.util import find_spec
from pathlib import Path

import transformers
from transformers import AutoConfig, pipeline

PACKAGES = ["torchvision", "numba", "modeling_evmamba", "evmamba_kernels", "evmamba_hub"]
*repositories, example = sys.argv[1:]
found = {"installed": [name for name in PACKAGES if find_spec(name)], "results": [], "modules": [], "reloaded": []}
for repository in repositories:
    repo_id, task, settings = json.loads(repository)
    run = pipeline(task, model=repo_id, trust_remote_code=True)
    results = run(example, **settings)
    found["results"].append([{name: value for name, value in each.items() if name != "mask"} for each in results])
    found["modules"].append(type(run.model.config).__module__)
    run.save_pretrained(repo_id)
    again = pipeline(task, model=repo_id, trust_remote_code=True)
    found["reloaded"].append(again(example, **settings) == results)
    found["marked"] = getattr(transformers, type(run.model.config).__name__)._auto_class
found["files"] = sorted(path.name for path in Path(sys.modules[found["modules"][0]].__file__).parent.glob("*.py"))
print(json.dumps(found))
"""

HEADS_AUTO_MAP = {"AutoConfig": "heads_evmamba.UperNetConfig"}


@pytest.mark.parametrize("name, path", (find_remote_code() | find_remote_code(HEADS_AUTO_MAP)).items())
def test_files_of_a_bundle_demand_no_package(name, path):
    """transformers requires every package that a file imports outside of `try`, whether the file needs it or not."""
    known = {*sys.stdlib_module_names, "huggingface_hub", "numpy", "torch", "transformers"}
    assert set(get_imports(path)) <= known
    assert {f"{module}.py" for module in get_relative_imports(path)} <= find_remote_code(HEADS_AUTO_MAP).keys()


def create_environment(folder: Path, kind: str) -> Path:
    """Create a virtual environment with torch, transformers and Pillow, which transformers needs to read images."""
    venv.create(folder, with_pip=kind == "installed")
    if kind == "installed":
        options = ["-q", "--no-compile", "-c", ROOT / "constraints.txt"]
        packages = ["torch", "transformers", "pillow"]
        subprocess.run([folder / "bin" / "python", "-m", "pip", "install", *options, *packages], check=True)
    else:
        link_distributions(folder, ["torch", "transformers", "pillow", *(["numba"] if kind == "with_numba" else [])])
    return folder


def use(environment: Path, *arguments: object, script: str = SCRIPT) -> dict:
    """Run a script outside of the repository, with an empty cache."""
    variables = {name: os.environ[name] for name in ("PATH", "HF_ENDPOINT", "HF_HUB_DISABLE_XET")}
    home = environment / "home"
    completed = subprocess.run(
        [environment / "bin" / "python", "-c", script, *map(str, arguments)],
        cwd=environment,
        env={**variables, "HOME": str(home), "HF_HOME": str(home), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert completed.returncode == 0, completed.stderr
    return json.loads(completed.stdout.splitlines()[-1])


@pytest.fixture
def repositories(hub) -> list[str]:
    """Two repositories with the same code."""
    repo_ids = ["someone/digits", "someone/other-digits"]
    for repo_id in repo_ids:
        hub.create(repo_id, collect_model_files(DIGITS, repo_id))
    return repo_ids


@pytest.mark.parametrize(
    "kind",
    [
        "linked",
        pytest.param("with_numba", marks=pytest.mark.slow),
        pytest.param("installed", marks=[pytest.mark.wheel, pytest.mark.timeout(1200)]),
    ],
)
def test_a_clean_environment(hub, repositories, tmp_path, kind):
    found = use(create_environment(tmp_path / "environment", kind), *repositories, EXAMPLE)
    accelerated = kind == "with_numba"
    # A build of PyTorch for GPUs brings Triton
    brought = find_requirements("torch", set()) & {"triton"}
    assert set(found["installed"]) == brought | ({"numba"} if accelerated else set())
    assert all(module.startswith("transformers_modules.someone.digits.") for module in found["modules"])
    # transformers fetches only the files that the classes can load, so the bundle holds no others
    assert found["files"] == sorted({"__init__.py", *find_remote_code()})
    assert ("numba" in found["usable"]) == accelerated
    assert found["backend"] == [*found["usable"], "torch"][0]
    # Our own operators call the accelerated backends. Without these, only PyTorch's operators run.
    # The code of the other repository is loaded by then, and must not take their names.
    names = {operator.partition("::")[2] for operator in found["operators"]}
    scan = {"atrous_selective_scan"} if found["usable"] else set()
    assert names == scan | ({"layer_norm_gated", "layer_norm_mean"} if accelerated else set())
    assert all(operator.startswith("transformers_modules_someone_digits_") for operator in found["operators"])

    model = EfficientVMambaForImageClassification.from_pretrained(DIGITS)
    inputs = AutoImageProcessor.from_pretrained(DIGITS)(Image.open(EXAMPLE).convert("RGB"), return_tensors="pt")
    outputs = model(**inputs, labels=torch.tensor([3]))
    outputs.loss.backward()
    for logits in (found["logits"], found["other_logits"]):
        torch.testing.assert_close(torch.tensor(logits), outputs.logits.detach(), rtol=1e-4, atol=1e-4)
    assert found["gradient"] == pytest.approx(model.classifier.weight.grad.norm().item(), rel=1e-3)
    assert found["hidden_states"] == [1, 64, 2, 2]
    assert found["feature_maps"] == [[1, 16, 16, 16], [1, 64, 2, 2]]
    assert found["label"] == "3"


def test_heads_in_a_clean_environment(hub, tmp_path):
    """Only `trust_remote_code` is needed, and a head that was saved again needs no more."""
    if Version(transformers.__version__) < Version("5.22"):
        pytest.skip('without torchvision, UperNet needs a newer transformers: pip install "transformers>=5.22"')
    heads = [(SEGMENTER, "image-segmentation", {}), (DETECTOR, "object-detection", {"threshold": 0.0})]
    repositories, expected = [], []
    for name, task, settings in heads:
        folder, repo_id = save_dense_model(tmp_path / name, name), f"someone/{name}"
        hub.create(repo_id, collect_model_files(folder, repo_id))
        repositories.append(json.dumps([repo_id, task, settings]))
        results = pipeline(task, model=str(folder))(str(EXAMPLE), **settings)
        expected.append([{name: value for name, value in each.items() if name != "mask"} for each in results])
    environment = create_environment(tmp_path / "environment", "linked")
    found = use(environment, *repositories, EXAMPLE, script=HEADS_SCRIPT)
    assert found["installed"] == [] and found["reloaded"] == [True, True] and found["marked"] is None
    assert all(each.startswith("transformers_modules.someone.") for each in found["modules"])
    assert found["files"] == sorted({"__init__.py", *find_remote_code(HEADS_AUTO_MAP)})
    for results, known in zip(found["results"], expected, strict=True):
        assert [each["label"] for each in results] == [each["label"] for each in known]
        assert [each["score"] for each in results] == pytest.approx([each["score"] for each in known], abs=1e-4)


def test_heads_beside_the_installed_package(hub, tmp_path):
    folder = save_dense_model(tmp_path / "detector", DETECTOR)
    hub.create("someone/detector", collect_model_files(folder, "someone/detector"))
    for options in ({}, {"trust_remote_code": True}):
        config = AutoConfig.from_pretrained("someone/detector", **options)
        assert type(config.backbone_config) is EfficientVMambaConfig
        model = pipeline("object-detection", model="someone/detector", **options).model
        assert type(find_backbone(model)) is EfficientVMambaBackbone


def test_a_bundle_beside_the_installed_package(hub, repositories, tmp_path):
    """A registered class takes precedence over that of the repository, without `trust_remote_code`."""
    for options in ({}, {"trust_remote_code": True}):
        model = AutoModelForImageClassification.from_pretrained(repositories[0], **options)
        assert type(model) is EfficientVMambaForImageClassification
