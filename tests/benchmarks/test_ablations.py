"""The task of the ablations, the networks that are compared, and a tiny run of the script."""

import csv
import runpy
import sys

import numpy as np
import pytest
import torch
from scipy import ndimage

from benchmarks import ablations
from modeling_evmamba.modeling_evmamba import EfficientVMambaEVSSLayer


@pytest.fixture(scope="module")
def wires() -> ablations.Wires:
    return ablations.Wires(1000, seed=5, description="drawing")


def test_images_come_from_the_seed(wires):
    again, other = (ablations.Wires(20, seed, "drawing") for seed in (5, 6))
    assert np.array_equal(again.images, wires.images[:20])
    assert np.array_equal(again.labels, wires.labels[:20])
    assert not np.array_equal(other.images, again.images)


def test_one_half_is_connected(wires):
    assert abs(wires.labels.mean() - 0.5) < 0.05


def test_labels_are_what_a_flood_finds(wires):
    for image, is_connected, mark in zip(wires.images, wires.labels, wires.marks, strict=True):
        ink = (image != 255).any(axis=2)
        areas, _ = ndimage.label(ink, structure=np.ones((3, 3)))
        assert (areas[round(mark), ablations.MARGIN] == areas[0, -1]) == is_connected


def test_half_of_the_wires_are_whole(wires):
    """Each wire that is cut leaves one piece that the bar does not hold."""
    for image in wires.images:
        _, number = ndimage.label((image != 255).any(axis=2), structure=np.ones((3, 3)))
        assert number == 1 + ablations.NUM_CUT


def test_neither_ink_nor_mark_tells_the_label(wires):
    training = ablations.Wires(2000, seed=7, description="drawing")
    for name, accuracy in ablations.measure_shortcuts(training, wires).items():
        assert abs(accuracy - 50) < 5, name


def test_items_are_what_the_networks_take(wires):
    item = wires[3]
    assert item["pixel_values"].shape == (3, 64, 64)
    assert (item["pixel_values"].min(), item["pixel_values"].max()) == (0, 1)
    assert item["labels"].dtype == torch.int64


@pytest.mark.parametrize("name", ablations.NETWORKS)
def test_networks_are_of_one_size_and_train(name, wires):
    network = ablations.NETWORKS[name]
    model = ablations.create_model(network)
    paper = ablations.create_model(ablations.NETWORKS["paper"])
    assert 0.85 < model.num_parameters() / paper.num_parameters() <= 1

    evss_layers = [layer for layer in model.modules() if isinstance(layer, EfficientVMambaEVSSLayer)]
    assert len(evss_layers) == network.block_types.count("evss")
    names = {parameter_name.rpartition(".")[2] for parameter_name, _ in model.named_parameters()}
    assert ("A_log" in names) == (network.has_scan and bool(evss_layers))
    has_local_branch = any(".local_branch." in parameter_name for parameter_name, _ in model.named_parameters())
    assert has_local_branch == (network.has_local_branch and bool(evss_layers))

    items = [wires[index] for index in range(4)]
    batch = {key: torch.stack([item[key] for item in items]) for key in items[0]}
    model(**batch).loss.backward()
    for parameter_name, parameter in model.named_parameters():
        assert parameter.isfinite().all() and parameter.grad.isfinite().all(), parameter_name


def test_without_its_scan_a_mixer_looks_no_further_than_its_convolution():
    for name, reach in {"paper": 12, "no-scan": 1}.items():
        torch.manual_seed(0)
        mixer = ablations.create_model(ablations.NETWORKS[name]).efficientvmamba.encoder.stages[0].layers[0].mixer
        hidden_states = torch.randn(1, 16, 16, 24, requires_grad=True)
        mixer(hidden_states)[0, 8, 14].sum().backward()
        columns = hidden_states.grad[0].abs().sum(dim=(0, 2)).nonzero().flatten()
        assert 14 - columns.min() >= reach
        if name == "no-scan":
            assert 14 - columns.min() == reach


def test_short_run(tmp_path, capsys):
    ablations.main(networks=["paper", "no-scan"], seeds=2, steps=2, images=100, output_dir=tmp_path)
    with (tmp_path / "ablations.csv").open() as file:
        rows = list(csv.DictReader(line for line in file if not line.startswith("#")))
    assert [(row["network"], row["seed"]) for row in rows] == [
        ("paper", "0"),
        ("no-scan", "0"),
        ("paper", "1"),
        ("no-scan", "1"),
    ]
    assert all(30 < float(row["held-out accuracy %"]) < 70 for row in rows)
    assert "Classifiers that follow no wire" in capsys.readouterr().out


def test_summary_states_the_spread():
    runs = [("a", 50.0), ("b", 70.0), ("a", 60.0), ("b", 71.0)]
    rows = [{"network": name, "parameters": 9, "held-out accuracy %": value, "seconds": 1.0} for name, value in runs]
    first, second = ablations.summarize(rows)
    assert (first["network"], first["seeds"]) == ("a", 2)
    assert (first["mean accuracy %"], first["lowest"], first["highest"]) == (55, 50, 60)
    assert (second["mean accuracy %"], second["lowest"], second["highest"]) == (70.5, 70, 71)


def test_names_the_networks_that_there_are(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["ablations.py", "--network", "resnet"])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(ablations.__file__, run_name="__main__")
    assert end.value.code == 1
    assert "Error: unknown network 'resnet': --network accepts paper, evss-late" in capsys.readouterr().err
