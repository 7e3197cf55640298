"""The networks that are compared."""

import pytest

from benchmarks import networks


@pytest.mark.parametrize("name", [name for name, peer in networks.PEERS.items() if peer.config is not None])
def test_networks_of_transformers_have_the_published_sizes(name):
    network = networks.create_peer(name, None)
    assert network.source == "transformers" and not network.model.training
    assert network.model.config.num_labels == 1000


def test_another_size_is_refused(monkeypatch):
    monkeypatch.setitem(networks.PEERS, "DeiT-Ti", networks.PEERS["DeiT-Ti"]._replace(millions=6.5))
    with pytest.raises(ValueError, match=r"DeiT-Ti has 5\.72 M parameters, not 6\.5 M"):
        networks.create_peer("DeiT-Ti", None)


def test_networks_that_need_timm_are_left_out(monkeypatch, capsys):
    monkeypatch.setattr(networks, "import_timm", lambda: None)
    assert list(networks.create_networks(["EfficientVMamba-T", "MobileNetV4-Conv-M"])) == ["EfficientVMamba-T"]
    assert "MobileNetV4-Conv-M is left out: it needs timm" in capsys.readouterr().out


def test_networks_of_timm_have_the_published_sizes():
    pytest.importorskip("timm", exc_type=ImportError)
    for name, network in networks.create_networks().items():
        assert network.source == ("this package" if name in networks.OURS else "timm")


def test_every_network_has_a_published_accuracy():
    assert list(networks.PUBLISHED_ACCURACY) == networks.NAMES
