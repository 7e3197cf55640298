"""The directory of a run: one run at a time owns it, and a later run resumes from it."""

import multiprocessing
import os
import re
import shutil
import signal
import time

import pytest
import torch

from evmamba_hub.errors import UserError
from modeling_evmamba import EfficientVMambaForImageClassification
from training_evmamba.recipe import read_values
from training_runs import assert_same_models, read_log, read_losses, start, train


def train_in_another_process(recipe, output_dir, resume):
    torch.set_num_threads(1)
    train(recipe, output_dir, resume)


@pytest.mark.slow
def test_killed_at_any_moment_and_resumed_it_gives_the_same_weights(make_recipe, tmp_path):
    recipe = make_recipe(epochs=4, mixup_alpha=0.2, cutmix_alpha=1.0, drop_path_rate=0.2, checkpoint_steps=2)
    unbroken, killed = tmp_path / "unbroken", tmp_path / "killed"
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["training_evmamba.trainer"])
    process = context.Process(target=train_in_another_process, args=(recipe, unbroken, False))
    process.start()
    process.join(300)
    assert process.exitcode == 0

    log = killed / "log.jsonl"
    for number in range(7):
        old = log.stat().st_ino if log.exists() else None
        process = context.Process(target=train_in_another_process, args=(recipe, killed, True))
        process.start()
        # wait for progress: the run first replaces the log, then adds lines
        while process.is_alive() and (not log.exists() or log.stat().st_ino == old or not log.stat().st_size):
            time.sleep(0.001)
        if number < 6:
            time.sleep(0.03 * number)  # in a step, in an evaluation, in a checkpoint
            os.kill(process.pid, signal.SIGKILL)
        process.join(300)
        assert process.exitcode == (-signal.SIGKILL if number < 6 else 0), "it was too fast to be killed"
    assert_same_models(killed, unbroken)
    assert read_losses(killed) == read_losses(unbroken)
    assert [record["step"] for record in read_log(killed)] == [record["step"] for record in read_log(unbroken)]
    assert not list(killed.rglob(".*"))


def test_a_folder_is_of_one_run_at_a_time(make_recipe, tmp_path):
    output = tmp_path / "run"
    run = start(make_recipe(), output)
    written = read_values(str(output / "recipe.yaml"))
    for resume in (False, True):
        with pytest.raises(UserError, match=r"another run writes to .*run: wait until it ends, or choose another"):
            train(make_recipe(learning_rate=1e-3), output, resume=resume)
    assert read_values(str(output / "recipe.yaml")) == written
    run.train()
    assert not list(output.rglob(".*"))
    (output / ".lock").touch()  # as a killed run leaves it
    train(make_recipe(), output, resume=True)
    assert not list(output.rglob(".*"))


def test_a_run_that_is_complete_can_be_resumed(make_recipe, tmp_path):
    results = train(make_recipe(), tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "model")
    assert train(make_recipe(), tmp_path / "run", resume=True) == results
    assert (tmp_path / "run" / "model" / "model.safetensors").is_file()


def test_resuming_needs_the_same_recipe_and_data(make_recipe, stripes, tmp_path):
    images = tmp_path / "images"
    shutil.copytree(stripes, images)
    output = tmp_path / "run"
    train(make_recipe(dataset=str(images)), output)
    new_run = re.escape(f"choose another --output-dir, with --model {output / 'model'} to train the finished model")
    with pytest.raises(UserError, match=f"a run: pass `--resume auto` to continue it, or {new_run} further"):
        train(make_recipe(dataset=str(images)), output)
    with pytest.raises(UserError, match=rf"another recipe .*learning_rate was 0.003, is 0.001.*, or {new_run}"):
        train(make_recipe(dataset=str(images), learning_rate=1e-3), output, resume=True)
    shutil.rmtree(output / "model")
    (images / "train" / "vertical" / "01.png").unlink()
    changed = "the dataset has changed since the run began: it had 37 images"
    with pytest.raises(UserError, match=f"{changed} .* Restore it, or choose another --output-dir$"):
        train(make_recipe(dataset=str(images)), output, resume=True)


def test_refuses_a_folder_with_other_files(make_recipe, tmp_path):
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(UserError, match=r"thesis\.tex is a file: --output-dir takes a directory"):
        train(make_recipe(), tmp_path / "thesis.tex")
    with pytest.raises(UserError, match="holds files that do not belong to a run"):
        train(make_recipe(), tmp_path)


def test_names_that_are_not_utf8(make_recipe, stripes, tmp_path):
    """In the recipe, the trackers, the configuration and the card."""
    data = tmp_path / os.fsdecode(b"d\xe9")
    try:
        shutil.copytree(stripes, data)
    except OSError as error:
        pytest.skip(f"the file system refuses the name: {error}")
    name = os.fsdecode(b"gr\xfcn")
    for split in ("train", "validation"):
        (data / split / "vertical").rename(data / split / name)
    recipe = make_recipe(dataset=str(data), epochs=1, report_to=["tensorboard"])
    train(recipe, tmp_path / "run")
    model = EfficientVMambaForImageClassification.from_pretrained(tmp_path / "run" / "model")
    assert sorted(model.config.id2label.values()) == sorted(["horizontal", name])
    assert r"| d\xe9 |" in (tmp_path / "run" / "model" / "README.md").read_text(encoding="utf-8")
    with pytest.raises(UserError, match="is not UTF-8: choose another --output-dir"):
        train(recipe, tmp_path / os.fsdecode(b"r\xe9"))
    assert not (tmp_path / os.fsdecode(b"r\xe9")).exists()
