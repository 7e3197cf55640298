"""A short run of the script that makes the demonstration checkpoint."""

import pytest
import torch
from huggingface_hub import ModelCard

from hub_scripts import train_digits
from hub_scripts.errors import UserError
from hub_scripts.train_digits import create_image_processor, create_model, evaluate, main, to_pixel_values, train
from training_evmamba.digits import SEED, Digits, load_splits


@pytest.fixture(scope="module")
def splits():
    return load_splits()


def test_short_training_run(tmp_path, monkeypatch, splits):
    training, held_out = (Digits(digits.images[:160], digits.labels[:160]) for digits in splits)
    monkeypatch.setattr(train_digits, "load_splits", lambda: (training, held_out))
    output = tmp_path / "runs" / "digits"
    losses = main(output, epochs=4)
    assert len(losses) == 4
    assert losses[-1] < losses[0]
    correct = evaluate(output, held_out)
    assert f"| dark on light | {correct} of 160 |" in ModelCard.load(output / "README.md").text
    assert len(list((output.parent / "examples").glob("*.png"))) == 10
    assert sorted(path.name for path in output.parent.iterdir()) == ["digits", "examples"]

    before = (output / "model.safetensors").stat().st_ino
    main(output, epochs=1)
    assert (output / "model.safetensors").stat().st_ino != before
    assert sorted(path.name for path in output.parent.iterdir()) == ["digits", "examples"]


def test_the_seed_fixes_the_weights(splits):
    training, _ = splits
    pixel_values = to_pixel_values(training, create_image_processor())[:80]

    def trained_weights() -> dict[str, torch.Tensor]:
        torch.manual_seed(SEED)
        model = create_model()
        train(model, pixel_values, training.labels[:80], epochs=1)
        return model.state_dict()

    torch.testing.assert_close(trained_weights(), trained_weights(), rtol=0, atol=0)


def test_refuses_to_replace_a_folder_that_is_no_checkpoint(tmp_path):
    (tmp_path / "notes.txt").touch()
    with pytest.raises(UserError, match="holds no checkpoint"):
        main(tmp_path)
    assert (tmp_path / "notes.txt").exists()
