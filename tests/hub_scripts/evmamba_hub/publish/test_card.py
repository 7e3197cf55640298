"""The content of model cards, and its sources."""

import json
import re
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard, ModelCardData

from evmamba_hub.errors import Notice, UserError
from evmamba_hub.publish.card import (
    TOP1,
    UNKNOWN_TRAINING,
    CardDetails,
    read_results,
    render_card,
    result_entries,
    to_eval_results,
)
from evmamba_hub.publish.card_metadata import add_results
from evmamba_hub.publish.republish import load_manifest
from modeling_evmamba import (
    VARIANTS,
    EfficientVMambaBackbone,
    EfficientVMambaConfig,
    EfficientVMambaForImageClassification,
)


RESULTS = {
    "dataset": "someone/flowers",
    "dataset_id": "someone/flowers",
    "dataset_config": None,
    "dataset_split": "test",
    "dataset_revision": "0" * 40,
    "top1": 0.87654321,
    "top5": 0.98,
    "loss": 0.5,
}


def render_classifier_card(details: CardDetails) -> ModelCard:
    return render_card(
        "someone/model", EfficientVMambaConfig(num_labels=7), EfficientVMambaForImageClassification, details
    )


def write_results(folder: Path, model: str, num_classes: int) -> Path:
    """Write a model of seven classes, and results of a model of any number. Return their path."""
    EfficientVMambaConfig(num_labels=7).save_pretrained(folder / "model")
    path = folder / "results.json"
    path.write_text(json.dumps({**RESULTS, "model": model, "classes": num_classes}))
    return path


def metadata(card: ModelCard) -> dict:
    return yaml.safe_load(re.match(r"---\n(.*?)\n---\n", str(card), re.DOTALL)[1])


def sections(card: ModelCard) -> list[str]:
    return re.findall(r"^## (.*)$", card.text, re.MULTILINE)


@pytest.mark.parametrize("checkpoint", load_manifest(), ids=lambda checkpoint: checkpoint.variant)
def test_cards_of_the_authors_checkpoints(checkpoint):
    config = EfficientVMambaConfig(**VARIANTS[checkpoint.variant], num_labels=1000)
    card = render_card("someone/model", config, EfficientVMambaForImageClassification, checkpoint.details)
    data = metadata(card)
    assert data["library_name"] == "transformers"
    assert data["pipeline_tag"] == "image-classification"
    assert data["license"] == "apache-2.0"
    assert data["datasets"] == ["ILSVRC/imagenet-1k"]
    assert {"efficientvmamba", "vision"} < set(data["tags"])
    (result,) = data["model-index"][0]["results"]
    assert result["dataset"]["type"] == "ILSVRC/imagenet-1k"
    assert result["metrics"] == [{"type": "accuracy", "value": checkpoint.top1 / 100, "name": TOP1}]
    assert result["source"]["url"] == checkpoint.log

    size = {"tiny": ("6,493,660", "0.787"), "small": ("11,273,688", "1.317"), "base": ("33,717,136", "3.950")}
    for value in (*size[checkpoint.variant], str(checkpoint.top1 / 100), checkpoint.log, checkpoint.source):
        assert value in card.text
    assert f"published variant {checkpoint.variant}" in card.text
    assert sections(card) == [
        "How to use",
        "Size and speed",
        "Results",
        "Training",
        "Limits and biases",
        "Citation",
    ]
    assert "benchmarks/RESULTS.md" in card.text
    assert "{" not in card.text.split("```bibtex")[0]  # no placeholder of the template is left


def test_the_code_of_a_card_is_python(tmp_path):
    for model_class, num_blocks in [(EfficientVMambaForImageClassification, 4), (EfficientVMambaBackbone, 1)]:
        config = EfficientVMambaConfig(hidden_sizes=[8] * 4, depths=[1] * 4)
        card = render_card("someone/model", config, model_class, CardDetails())
        assert f"{model_class(config).num_parameters():,} parameters" in card.text
        blocks = re.findall(r"```python\n(.*?)```", card.text, re.DOTALL)
        assert len(blocks) == num_blocks
        for block in blocks:
            compile(block, "card", "exec")
            assert "someone/model" in block


def test_a_card_says_no_more_than_is_known():
    card = render_card(
        "someone/model", EfficientVMambaConfig(num_labels=7), EfficientVMambaForImageClassification, CardDetails()
    )
    assert metadata(card).keys() == {"library_name", "pipeline_tag", "tags"}
    assert "Results" not in sections(card)
    assert UNKNOWN_TRAINING in card.text and "a classifier of 7 classes" in card.text


@pytest.mark.parametrize("dtype, suffix", [("float32", ""), ("bfloat16", ", bfloat16"), ("int8", ", int8")])
def test_metrics_name_other_dtypes_than_float32(dtype, suffix):
    entries = to_eval_results({**RESULTS, "dtype": dtype})
    assert [each.metric_name for each in entries] == [f"{TOP1}{suffix}", f"Top-5 accuracy{suffix}", f"Loss{suffix}"]
    assert bool(result_entries(entries)) == (dtype == "float32")  # the Hub's leaderboards compare models in float32


def test_a_fine_tuned_model():
    details = CardDetails(
        license="mit",
        base_model="someone/tiny",
        datasets=["someone/flowers"],
        results=to_eval_results(RESULTS),
    )
    card = render_card(
        "someone/model", EfficientVMambaConfig(num_labels=7), EfficientVMambaForImageClassification, details
    )
    data = metadata(card)
    assert (data["license"], data["base_model"], data["datasets"]) == ("mit", "someone/tiny", ["someone/flowers"])
    assert "| someone/flowers | Top-1 accuracy | 0.8765 | measured by the package |" in card.text
    assert str(ModelCard(str(card))) == str(card)


def test_the_table_shows_the_values_of_the_metadata():
    card = str(render_classifier_card(CardDetails(results=to_eval_results(RESULTS))))
    later = to_eval_results({**RESULTS, "top1": 0.5, "loss": 0.75})
    assert add_results(card, ["model"], later) == str(render_classifier_card(CardDetails(results=later)))
    others = to_eval_results({**RESULTS, "dataset_split": "train", "top1": 0.25})
    assert "0.25" not in ModelCard(add_results(card, ["model"], others)).text


@pytest.mark.parametrize(
    "directory, split, expected",
    [
        ("digits", None, ("digits", None)),
        ("digits", "validation", ("digits", "validation")),  # as `evmamba train` gives it
        ("digits/validation", "validation", ("digits", "validation")),  # as `evmamba evaluate` gives it
        ("digits/train/../Val/", None, ("digits", "Val")),
        ("digits/fold 3", "fold 3", ("digits", "fold 3")),
        ("digits/fold 3", None, ("fold 3", None)),
        ("/test", None, ("test", None)),
    ],
)
def test_a_directory_has_one_name_with_and_without_its_split(directory, split, expected):
    results = {**RESULTS, "dataset_id": None, "dataset": directory, "dataset_split": split}
    assert {(result.dataset_name, result.dataset_split) for result in to_eval_results(results)} == {expected}


def test_results_in_the_newer_form():
    (path, content), *others = result_entries(to_eval_results(RESULTS)).items()
    assert (path, others) == (".eval_results/flowers.yaml", [])
    dataset = {"id": "someone/flowers", "task_id": "default", "revision": "0" * 40}
    assert yaml.safe_load(content) == [{"dataset": dataset, "value": 87.65, "notes": "Top-1 accuracy, test"}]
    assert result_entries(to_eval_results({**RESULTS, "dataset_id": None, "dataset": "photos"})) == {}


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"top1": 1}'])
def test_files_that_hold_no_results(tmp_path, content):
    (tmp_path / "results.json").write_text(content)
    with pytest.raises(UserError, match="holds no results"):
        read_results(tmp_path / "results.json", tmp_path, "someone/model")


@pytest.mark.parametrize("model", ["someone/model", "MODEL", "MODEL/../model/"])
def test_results_of_this_model(tmp_path, recwarn, model):
    path = write_results(tmp_path, model.replace("MODEL", str(tmp_path / "model")), 7)
    assert [result.metric_value for result in read_results(path, tmp_path / "model", "someone/model")] == [
        0.8765,
        0.98,
        0.5,
    ]
    assert not recwarn.list


def test_results_of_another_model(tmp_path):
    path = write_results(tmp_path, "demo/digits", 10)
    with pytest.raises(UserError, match=r"of demo/digits, which has 10 classes, and .*model has 7: evaluate"):
        read_results(path, tmp_path / "model", "someone/model")
    path = write_results(tmp_path, "someone/other", 7)
    with pytest.warns(Notice, match="holds results of someone/other: check that .*model is the same model"):
        assert len(read_results(path, tmp_path / "model", "someone/model")) == 3


def test_markup_in_names_is_data():
    """Names come from other repositories, and must not be rendered as templates."""
    details = CardDetails(license="mit", base_model="{{ 7 * 7 }}/x", datasets=["a: [b"])
    card = render_classifier_card(details)
    assert metadata(card)["base_model"] == "{{ 7 * 7 }}/x"
    assert card.data == ModelCardData(**metadata(card))
