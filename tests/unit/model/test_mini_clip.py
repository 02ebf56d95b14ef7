"""The CLIP that comes with the package: small, offline, and with something left to learn."""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

import numpy as np
import pytest

from secure_fed import configs
from secure_fed.model.backbone import load_backbone
from secure_fed.model.loaded_backbone import LoadedBackbone
from secure_fed.protocol.study_tables import Backbone

sys.path.insert(0, str(Path(__file__).parents[3] / "scripts"))
import mini_clip

WEIGHTS = configs.MODELS / "mini-clip.safetensors"


@pytest.fixture(scope="module")
def backbone() -> LoadedBackbone:
    return load_backbone(Backbone(model="mini-clip", weights="file", file=WEIGHTS.name), None)


def test_the_weights_are_small_and_those_of_the_card() -> None:
    data = WEIGHTS.read_bytes()
    assert len(data) <= 20 * 2**20
    assert hashlib.sha256(data).hexdigest() in (configs.MODELS / "mini-clip.md").read_text()


def test_zero_shot_leaves_something_to_learn_and_the_words_mean_something(backbone: LoadedBackbone) -> None:
    assert backbone.dim == 512
    cases = mini_clip.phantom_cases(20, 40)
    unseen = cases.origin >= 10
    labels = cases.y[unseen]
    features = backbone.encode_images([picture for picture, keep in zip(cases.pictures, unseen, strict=True) if keep])

    def balanced_accuracy(prompts: tuple[str, ...]) -> float:
        predicted = (features @ backbone.encode_texts(prompts).T).argmax(axis=1)
        return float(np.mean([np.mean(predicted[labels == label] == label) for label in range(4)]))

    plain = balanced_accuracy(mini_clip.PROMPTS)
    assert 0.40 <= plain <= 0.70
    others = [balanced_accuracy(prompts) for prompts in zip(*mini_clip.PARAPHRASES, strict=True)]
    assert np.mean(others) >= 0.9 * plain
    assert balanced_accuracy(tuple(reversed(mini_clip.PROMPTS))) < 0.3
