"""Methods as a study names them: each is one file, learns, and keeps at the site what must stay there."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import torch

from secure_fed.clients.features import Labelled, SiteFeatures
from secure_fed.clients.site import Site
from secure_fed.clients.training import predict, train_round
from secure_fed.core.errors import BackboneError, GuardError, PrivateMethodError, StudyError
from secure_fed.lab.simulation import Listener, open_sites, prepare, simulate
from secure_fed.model.adapters import PRIVATE_HEAD, Adapter, build_adapter, check_method, initial_parameters
from secure_fed.model.backbone import load_backbone, make_random_checkpoint
from secure_fed.model.loaded_backbone import LoadedBackbone
from secure_fed.model.text_tower import TextTower
from secure_fed.privacy.dp_training import refuse_method
from secure_fed.privacy.guard import check_structure
from secure_fed.protocol import codec
from secure_fed.protocol.initial_state import InitialState
from secure_fed.protocol.study import AgreedStudy, Study
from secure_fed.protocol.study_tables import ADAPTERS, Backbone, Method, Training
from tests.conftest import TRAINING, Federation, exchange, make_template, run_round

torch.set_num_threads(1)

SILENT = Listener(encoding=lambda *_: None, round=lambda _: None, stage=lambda _: None)
TEXTS = ("a dark image of a street", "a bright one", "stripes")


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> LoadedBackbone:
    path = tmp_path_factory.mktemp("backbone") / "weights.safetensors"
    make_random_checkpoint("random-small", 1, path)
    return load_backbone(Backbone(model="random-small", weights="random", seed=1), path)


@pytest.fixture(scope="module")
def tower(backbone: LoadedBackbone) -> TextTower:
    return backbone.text_tower(backbone.tokenize(TEXTS))


def test_every_adapter_is_one_file_with_one_class(tower: TextTower) -> None:
    assert ADAPTERS == ("facmic", "fedclip", "gaussian_head", "low_rank", "memory", "prompts", "text_head")
    prompts = np.eye(3, 128, dtype=np.float32)
    # A memory starts at patches of a task without prompts: test_anomaly.py.
    for name in (name for name in ADAPTERS if name != "memory"):
        method = Method(adapter=name)
        check_method(method)
        parameters = initial_parameters(method, 128, prompts, 0, tower)
        adapter = build_adapter(method, prompts, 20.0, parameters, tower)
        assert type(adapter).__module__ == f"secure_fed.model.adapters.{name}"
        assert (sys.modules[type(adapter).__module__].__doc__ or "").startswith(f"``{name}``: ")
        assert list(adapter.shared_parameters()) == list(parameters) == sorted(parameters)
        # The frozen tower of prompts normalises too, outside of what is trained; one sum trains nothing.
        if name not in ("prompts", "gaussian_head"):
            check_structure(adapter)


# --- prompts ---


def test_without_context_the_tower_is_the_backbones_own(backbone: LoadedBackbone, tower: TextTower) -> None:
    found = tower.encode(torch.empty(0, tower.width)).numpy()
    np.testing.assert_allclose(found, backbone.encode_texts(TEXTS), atol=1e-6)


def test_context_stands_before_the_text(backbone: LoadedBackbone, tower: TextTower) -> None:
    """Context vectors that are the embeddings of words give what those words would."""
    words = "one two three"
    tokens = torch.from_numpy(backbone.tokenize([words])[0][1:4])
    context = backbone._model.token_embedding(tokens)
    expected = backbone.encode_texts([f"{words} {text}" for text in TEXTS])
    np.testing.assert_allclose(tower.encode(context).detach().numpy(), expected, atol=1e-6)


def test_gradients_reach_the_context_and_nothing_else(backbone: LoadedBackbone, tower: TextTower) -> None:
    prompts = backbone.encode_texts(TEXTS)
    method = Method(adapter="prompts", context=4)
    parameters = initial_parameters(method, 128, prompts, 5, tower)
    assert parameters["context"].shape == (4, tower.width)
    assert parameters["context"].std() == pytest.approx(0.02, rel=0.2)
    adapter = build_adapter(method, prompts, 20.0, parameters, tower)
    adapter.logits(torch.from_numpy(prompts)).square().sum().backward()  # type: ignore[no-untyped-call]
    assert adapter.get_parameter("context").grad.abs().max() > 0  # type: ignore[union-attr]
    assert [name for name, _ in adapter.named_parameters()] == ["context"]
    assert all(weight.grad is None for weight in backbone._model.parameters())


def test_a_context_that_does_not_fit_is_refused(backbone: LoadedBackbone) -> None:
    tower = backbone.text_tower(backbone.tokenize(["word " * 40, "short"]))
    assert tower.room == 77 - 42
    with pytest.raises(StudyError, match=r"context = 36.*room for 35"):
        initial_parameters(Method(adapter="prompts", context=36), 128, np.eye(2, 128, dtype=np.float32), 0, tower)


@pytest.mark.parametrize("model", [SimpleNamespace(text=SimpleNamespace(pooler=1)), None], ids=["other", "last"])
def test_other_text_towers_are_refused(backbone: LoadedBackbone, model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    if model is None:
        model = backbone._model
        monkeypatch.setattr(model, "text_pool_type", "last")
    with pytest.raises(BackboneError, match="takes no context vectors"):
        TextTower(model, np.zeros((2, 77), dtype=np.int64))


def test_prompts_learn(backbone: LoadedBackbone, tower: TextTower) -> None:
    rng = np.random.default_rng(0)
    labels = np.arange(60) % 3
    prompts = backbone.encode_texts(TEXTS)
    # Random towers give nearly equal prompts; classes that differ along their small differences can be learnt.
    centres = 6 * (prompts - prompts.mean(0))[[1, 2, 0]]
    x = centres[labels] / np.linalg.norm(centres[0]) + 0.05 * rng.normal(size=(60, 128))
    x = (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)
    empty = Labelled(x[:0], labels[:0])
    site = SiteFeatures(Labelled(x, labels), empty, empty, x[:0], 0, 0)
    method = Method(adapter="prompts", context=8)
    start = initial_parameters(method, 128, prompts, 0, tower)
    training = Training(steps=60, learning_rate=0.03, batch_size=16)
    study = AgreedStudy(
        Study.model_construct(method=method, training=training, seed=0), InitialState(start, prompts, 100.0)
    )
    before, after = (
        predict(study, parameters, x, None, tower)[np.arange(60), labels].mean()
        for parameters in (start, train_round(study, start, site, 1, tower))
    )
    assert after > before + 0.2


def test_a_site_without_unlabelled_images_says_that_nothing_aligns_it(
    images: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    template = make_template(method={"adapter": "facmic", "adaptation": "adversarial"})
    assert template.simulation is not None
    with_some = template.simulation.shares
    assert with_some is not None
    without = with_some.model_copy(update={"train": with_some.train + with_some.unlabelled, "unlabelled": 0.0})
    for name, shares, told in (("with", with_some, []), ("without", without, list(TRAINING))):
        caplog.clear()
        plan = template.simulation.model_copy(update={"shares": shares})
        agreed = prepare(template.model_copy(update={"simulation": plan}), tmp_path / name, images)
        assert agreed.study.method.adversarial_weight == 0.5  # which the template left to us
        for site in open_sites(agreed, tmp_path / name):
            site.features()
        lines = [text for text in caplog.messages if 'no unlabelled images for adaptation = "adversarial"' in text]
        assert [line.partition(":")[0] for line in lines] == told


def test_a_study_with_prompts_carries_tokens_and_context(images: Path, tmp_path: Path) -> None:
    template = make_template(rounds=1, method={"adapter": "prompts", "context": 3})
    out = tmp_path / "out"
    summary = simulate(template, out, images, SILENT)
    initial = InitialState.from_bytes((out / "study.safetensors").read_bytes())
    assert initial.prompt_tokens is not None
    assert initial.prompt_tokens.shape == (3, 77)
    assert initial.adapter["context"].shape == (3, 64)
    shared = safetensors.numpy.load((out / "adapter.safetensors").read_bytes())
    assert {name for name in shared if name.startswith("adapter.")} == {"adapter.context"}
    assert np.array_equal(shared["prompt_tokens"], initial.prompt_tokens)
    assert not np.array_equal(shared["adapter.context"], initial.adapter["context"])
    assert summary["method"] == "prompts"


# --- private head ---


@pytest.fixture
def personal(images: Path, tmp_path: Path) -> Federation:
    prepare(make_template(method={"adapter": "facmic", "private_head": True}), tmp_path / "out", images)
    return Federation(tmp_path / "out")


def heads(site: Site) -> list[Path]:
    return sorted((site.replica.files.folder.heads).glob("*"))


def test_a_private_head_stays_and_goes_on(personal: Federation) -> None:
    sites = personal.sites()
    coordinator = personal.begin(sites)
    run_round(coordinator, sites)
    run_round(coordinator, sites)
    for site in sites:
        exchange(coordinator, site)
    ash, birch, _, observer = sites
    stored = [safetensors.numpy.load(path.read_bytes())[PRIVATE_HEAD] for path in heads(ash)]
    assert len(stored) == 3
    assert not np.array_equal(stored[0], stored[1])
    # What was sent has the shared parameters' values and two counts, and no more.
    sizes = sum(value.size for value in ash.parameters.values())
    integers = next((ash.replica.files.folder.outbox).glob("*.integers"))
    sent = safetensors.numpy.load(integers.read_bytes())["integers"]
    assert sent.size == sizes + 2 * codec.Digits(16, codec.COUNT_BITS + 1).count
    assert PRIVATE_HEAD not in ash.parameters
    assert list(ash.personal(ash.parameters)) == [*sorted(ash.parameters), PRIVATE_HEAD]
    assert not np.array_equal(ash.personal({})[PRIVATE_HEAD], birch.personal({})[PRIVATE_HEAD])
    assert observer.personal(observer.parameters) == observer.parameters
    assert heads(observer) == []
    assert ash.adapter_digest == birch.adapter_digest == observer.adapter_digest


def test_a_crash_between_head_and_integers_changes_no_bit(personal: Federation) -> None:
    sites = personal.sites()
    coordinator = personal.begin(sites)
    run_round(coordinator, sites)
    ash = sites[0]
    ash.respond(coordinator.request(ash.name, ash.run, ash.position))
    head = heads(ash)[-1].read_bytes()
    integers = ash.replica.files.folder.integers(2)
    expected = integers.read_bytes()
    for path in (ash.replica.files.folder.outbox).iterdir():
        path.unlink()
    again = personal.site("ash")
    again.respond(coordinator.request(again.name, again.run, again.position))
    assert integers.read_bytes() == expected
    assert heads(again)[-1].read_bytes() == head


def test_no_other_site_sees_a_private_head(personal: Federation, monkeypatch: pytest.MonkeyPatch) -> None:
    from secure_fed.lab import simulation

    seen: dict[str, list[bool]] = {}
    true = Site.predictions

    def spy(site: Site, parameters: Any, agreed: Any = None) -> Any:
        seen.setdefault(site.name, []).append(PRIVATE_HEAD in (parameters or {}))
        return true(site, parameters, agreed)

    monkeypatch.setattr(Site, "predictions", spy)
    sites = personal.sites()
    coordinator = personal.begin(sites)
    run_round(coordinator, sites)
    simulation.evaluate(personal.agreed, sites, sites[0].parameters)
    # zero-shot, local only (three trained elsewhere), text heads (likewise), pooled, federated
    assert seen["dogwood"] == [False, *(False,) * 3, *(False,) * 3, True, False]
    for name in TRAINING:
        assert seen[name] == [False, True, False, True, True]


@pytest.mark.parametrize(
    ("method", "says"),
    [(Method(private_head=True), "private_head"), (Method(adapter="prompts"), "expected text_head")],
)
def test_under_differential_privacy_it_is_refused(method: Method, says: str) -> None:
    with pytest.raises(PrivateMethodError, match=says):
        refuse_method(method)


def test_the_guard_too_refuses_a_private_head() -> None:
    prompts = np.eye(3, 16, dtype=np.float32)
    parameters = initial_parameters(Method(), 16, prompts, 0) | {PRIVATE_HEAD: np.zeros((3, 16))}
    adapter: Adapter = build_adapter(Method(private_head=True), prompts, 20.0, parameters)
    with pytest.raises(GuardError, match="trained but not shared"):
        check_structure(adapter)


# --- the comparison ---


@pytest.mark.parametrize(
    "changes",
    [
        {"method": {"adapter": "facmic", "lmmd_weight": 1.0, "private_head": True}},
        {"method": {"adapter": "low_rank"}, "aggregation": {"rule": "fedadam", "learning_rate": 0.01}},
        {
            "method": {"adapter": "gaussian_head", "most_patients": 40, "min_patients": 2},
            "rounds": 2,
            "features": {"basis": "random", "dimensions": 8},
        },
    ],
    ids=["private head", "fedadam", "one sum"],
)
def test_the_comparisons_federation_in_memory_is_the_sites(
    images: Path, tmp_path: Path, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    summary = simulate(make_template(**changes), tmp_path / "out", images, SILENT)
    agreed = Federation(tmp_path / "out").agreed
    features = {site.name: site.features() for site in open_sites(agreed, tmp_path / "out") if site.name in TRAINING}
    path = Path(__file__).parents[2] / "benchmarks" / "brain_mri.py"
    spec = importlib.util.spec_from_file_location("brain_mri", path)
    assert spec is not None
    assert spec.loader is not None
    comparison = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "brain_mri", comparison)
    spec.loader.exec_module(comparison)
    found = comparison.federate(agreed, features)
    assert codec.adapter_digest(found.adapter) == summary["adapter_digest"]
    assert set(found.heads) == (set(TRAINING) if agreed.study.method.private_head else set())
