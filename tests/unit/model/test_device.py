"""Everything of a training step lies on the chosen device: shown with torch's fake CUDA tensors, as no card is needed.

A fake tensor computes nothing, but an operation that mixes devices is refused as on a card. It knows neither the number
of a class's images nor a backward pass without a driver: these two are stood in for. A run on a real card is not shown.
"""

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from secure_fed.clients.features import Labelled, SiteFeatures
from secure_fed.clients.sitefile import with_device
from secure_fed.clients.training import _descend
from secure_fed.core.errors import DeviceError
from secure_fed.model.adapters import build_adapter, initial_parameters
from secure_fed.protocol.study_tables import Method, Training


@pytest.mark.parametrize("method", [Method(), Method(norm="batch", loss="contrastive"), Method(adapter="low_rank")])
def test_a_training_step_stays_on_the_card(method, monkeypatch):
    rng = np.random.default_rng(0)
    prompts = rng.normal(size=(3, 16)).astype(np.float32)
    parameters = initial_parameters(method, 16, prompts, 0)
    train = Labelled(rng.normal(size=(10, 16)).astype(np.float32), rng.integers(0, 3, 10))
    none = np.empty((0, 16), dtype=np.float32)
    nobody = Labelled(none, np.empty(0, dtype=np.int64))
    losses = []
    monkeypatch.setattr(torch, "bincount", lambda y, minlength: torch.ones(minlength, device=y.device))
    monkeypatch.setattr(torch.Tensor, "backward", lambda loss: losses.append(loss.device.type))
    with FakeTensorMode(), torch.device("cuda"):
        adapter = build_adapter(method, prompts, 100.0, parameters)
        features = SiteFeatures(train, nobody, nobody, none, 0, 0)
        _descend(adapter, method, Training(steps=2, learning_rate=1e-3, batch_size=8), features, 0)
        assert {value.device.type for value in adapter.parameters()} == {"cuda"}
    assert losses == ["cuda", "cuda"]


def test_a_site_refuses_a_card_that_is_not_there(federation, monkeypatch):
    from secure_fed.clients.site import Site
    from secure_fed.clients.sitefile import read_site_file

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    file = read_site_file(federation.folder / "sites" / "ash" / "site.toml")
    assert Site(file, federation.agreed).device == "cpu"
    assert with_device(file, None) is file
    with pytest.raises(DeviceError):
        Site(with_device(file, "cuda"), federation.agreed)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert Site(with_device(file, "auto"), federation.agreed).device == "cuda"


def test_the_device_reaches_backbone_training_and_cache(federation, monkeypatch):
    from secure_fed.clients import features, learner

    seen = []
    member = federation.site("ash")
    member.device = "cuda:1"
    monkeypatch.setattr(features, "load_backbone", lambda backbone, checkpoint, device: seen.append(device) or 1 / 0)
    with pytest.raises(ZeroDivisionError):  # features of the CPU are not taken for the card's
        member.features()
    assert seen == ["cuda:1"]
    monkeypatch.setattr(learner, "train_alone", lambda *arguments: arguments[-1])
    member._features = federation.site("ash").features()
    assert member.train_alone(federation.agreed) == "cuda:1"
