"""transformers' Trainer: training, evaluation, resuming, and the example of the documentation."""

import dataclasses
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image
from PIL import Image as PillowImage
from transformers import EvalPrediction, Trainer, TrainingArguments, pipeline

# in transformers 5.17, `transformers.AutoImageProcessor` is a placeholder that raises if torchvision is missing
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from modeling_evmamba import EfficientVMambaConfig, EfficientVMambaForImageClassification
from weights import assert_same_weights


ROOT = Path(__file__).parents[2]
DIGITS = ROOT / "demo" / "digits"
CLASSES = ["columns", "rows", "checks"]


def draw_pattern(label: int, generator: np.random.Generator) -> PillowImage.Image:
    """Draw stripes along or across the image, or both, in random colors and with noise."""
    rows, columns = np.indices((40, 32)) // 4 % 2
    pattern = (columns, rows, rows ^ columns)[label][..., None]  # (H, W, 1)
    colors = generator.uniform(0, 110, size=3) + pattern * 90
    return PillowImage.fromarray((colors + generator.uniform(0, 55, size=(40, 32, 3))).astype(np.uint8))


@pytest.fixture(scope="module")
def image_processor():
    return AutoImageProcessor.from_pretrained(DIGITS)


@pytest.fixture(scope="module")
def splits(image_processor) -> tuple[Dataset, Dataset]:
    """Return patterns for training, and others for evaluation. No batch size divides their number."""
    generator = np.random.default_rng(0)

    def to_tensors(batch: dict) -> dict:
        pixel_values = image_processor(batch["image"], return_tensors="pt").pixel_values
        return {"pixel_values": pixel_values, "labels": batch["label"]}

    def draw(number: int) -> Dataset:
        labels = [index % len(CLASSES) for index in range(number)]
        rows = {"image": [draw_pattern(label, generator) for label in labels], "label": labels}
        features = Features({"image": Image(), "label": ClassLabel(names=CLASSES)})
        return Dataset.from_dict(rows, features=features).with_transform(to_tensors)

    return draw(96), draw(50)


def create_trainer(folder: Path, splits: tuple[Dataset, Dataset], image_processor, **options) -> Trainer:
    torch.manual_seed(0)
    config = EfficientVMambaConfig(
        patch_size=2,
        hidden_sizes=[8, 16],
        depths=[1, 1],
        block_types=["evss", "inverted_residual"],
        id2label=dict(enumerate(CLASSES)),
        label2id={name: index for index, name in enumerate(CLASSES)},
    )
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=8,
        per_device_eval_batch_size=16,
        learning_rate=5e-3,
        logging_steps=4,
        remove_unused_columns=False,
        report_to=[],
        use_cpu=True,
        **options,
    )
    training, held_out = splits
    return Trainer(
        EfficientVMambaForImageClassification(config),
        arguments,
        train_dataset=training,
        eval_dataset=held_out,
        processing_class=image_processor,
        compute_metrics=measure_accuracy,
    )


def measure_accuracy(prediction: EvalPrediction) -> dict[str, float]:
    assert prediction.predictions.shape == (50, 3)  # logits alone, no hidden states
    return {"accuracy": float((prediction.predictions.argmax(axis=1) == prediction.label_ids).mean())}


def test_trains_evaluates_and_saves(tmp_path, splits, image_processor):
    trainer = create_trainer(tmp_path / "run", splits, image_processor, num_train_epochs=6, save_strategy="no")
    assert trainer.label_names == ["labels"]
    before = trainer.evaluate()
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.5 * losses[0]
    after = trainer.evaluate()
    assert after["eval_loss"] < before["eval_loss"]
    assert after["eval_accuracy"] > 0.9

    trainer.save_model(tmp_path / "model")
    classifier = pipeline("image-classification", model=str(tmp_path / "model"))
    generator = np.random.default_rng(1)
    for label, name in enumerate(CLASSES):
        assert classifier(draw_pattern(label, generator), top_k=1)[0]["label"] == name


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing.*` is deprecated")
@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "not reentrant"])
@pytest.mark.parametrize("name", ["gradient_checkpointing", "activation_checkpointing"])  # the latter since 5.23
def test_gradient_checkpointing_changes_nothing(tmp_path, splits, image_processor, name, use_reentrant):
    if name not in {field.name for field in dataclasses.fields(TrainingArguments)}:
        pytest.skip("transformers 5.17 lacks this name")
    # AdamW would scale up the rounding of gradients that are zero, such as those of biases before a batch norm
    usual = {"max_steps": 3, "save_strategy": "no", "optim": "sgd"}
    checkpointing = {name: True, f"{name}_kwargs": {"use_reentrant": use_reentrant}}
    states = []
    for folder, options in (("plain", {}), ("checkpointed", checkpointing)):
        trainer = create_trainer(tmp_path / folder, splits, image_processor, **usual, **options)
        trainer.train()
        states.append(trainer.model.state_dict())
    expected, actual = states
    assert expected["efficientvmamba.encoder.stages.0.layers.0.local_branch.batch_norm.num_batches_tracked"] == 3
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


def test_resumed_training_ends_at_the_same_weights(tmp_path, splits, image_processor):
    """Training resumes in the middle of the second epoch, with stochastic depth."""
    options = {"max_steps": 24, "save_steps": 18}
    unbroken = create_trainer(tmp_path / "unbroken", splits, image_processor, **options)
    unbroken.train()
    checkpoint = tmp_path / "unbroken" / "checkpoint-18"
    resumed = create_trainer(tmp_path / "resumed", splits, image_processor, **options)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    saved = EfficientVMambaForImageClassification.from_pretrained(checkpoint).state_dict()
    expected = unbroken.model.state_dict()
    assert not torch.equal(saved["classifier.weight"], expected["classifier.weight"])
    assert_same_weights(resumed.model.state_dict(), expected)


@pytest.mark.slow
def test_example_of_the_documentation(tmp_path):
    """The example runs unchanged, on an image folder where it expects one."""
    page = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    [example] = [block for block in blocks if 'load_dataset("imagefolder"' in block]
    shutil.copytree(DIGITS, tmp_path / "demo" / "digits")
    generator = np.random.default_rng(0)
    for label, name in enumerate(CLASSES):
        (tmp_path / "flowers" / name).mkdir(parents=True)
        for number in range(16):
            draw_pattern(label, generator).save(tmp_path / "flowers" / name / f"{number}.png")
    run = subprocess.run(
        [sys.executable, "-c", example],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(str(Path(path).resolve()) for path in sys.path)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr
    classifier = pipeline("image-classification", model=str(tmp_path / "flowers-model"))
    assert set(classifier.model.config.label2id) == set(CLASSES)
    pictures = [(label, draw_pattern(label, generator)) for label in [0, 1, 2] * 5]
    right = [classifier(picture, top_k=1)[0]["label"] == CLASSES[label] for label, picture in pictures]
    assert sum(right) > 10
