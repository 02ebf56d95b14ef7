import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy, normalize

from secure_fed.core.errors import StudyError
from secure_fed.model.adapters import (
    PRIVATE_HEAD,
    build_adapter,
    class_prompt_loss,
    contrastive_loss,
    ignored,
    initial_parameters,
    refuse_idle,
)
from secure_fed.privacy.dp_training import (
    class_prompt_patient_loss,
    clipped_sum,
    clipped_sum_by_hooks,
    gather_patients,
    to_double,
)
from secure_fed.protocol.basis import Basis
from secure_fed.protocol.study_tables import Method
from tests.conftest import make_template

METHODS = [
    Method(),
    Method(norm="batch"),
    Method(adapter="low_rank", rank=3),
    Method(adapter="text_head"),
    Method(adapter="fedclip"),
]
DIM, CLASSES, SCALE = 24, 5, 20.0


def unit(rows, seed=0, dim=DIM):
    values = np.random.default_rng(seed).normal(size=(rows, dim))
    return (values / np.linalg.norm(values, axis=1, keepdims=True)).astype(np.float32)


PROMPTS = unit(CLASSES, seed=100)


def build(method, seed=0, change=0.0):
    parameters = initial_parameters(method, DIM, PROMPTS, seed)
    rng = np.random.default_rng(1)
    moved = {name: value + change * rng.normal(size=value.shape) for name, value in parameters.items()}
    return build_adapter(method, PROMPTS, SCALE, moved)


def in_a_basis(moved=0.0):
    """A text head in five public dimensions, whose basis is no orthonormal one."""
    rng = np.random.default_rng(3)
    basis = Basis(rng.normal(size=DIM) / 9, rng.normal(size=(5, DIM)), 1.7, np.full(5, 0.5))
    start = initial_parameters(Method(adapter="text_head"), DIM, PROMPTS, 0, dimensions=5)
    assert start["offsets"].shape == (CLASSES, 5)
    offsets = {"offsets": start["offsets"] + moved * rng.normal(size=(CLASSES, 5))}
    return build_adapter(Method(adapter="text_head"), PROMPTS, SCALE, offsets, basis=basis), basis


def test_a_text_head_in_a_basis_adds_to_zero_shot_what_it_learns_there():
    x = unit(7)
    start, basis = in_a_basis()
    torch.testing.assert_close(start(torch.from_numpy(x)), torch.from_numpy(SCALE * x @ PROMPTS.T))
    adapter, _ = in_a_basis(moved=0.3)
    offsets = adapter.offsets.detach().double().numpy()
    expected = SCALE * (x.astype(float) @ PROMPTS.T + basis.linear(x) @ offsets.T)
    np.testing.assert_allclose(adapter(torch.from_numpy(x)).detach(), expected, rtol=1e-4, atol=1e-4)


def test_private_sums_of_a_text_head_in_a_basis_are_those_of_opacus():
    adapter = to_double(in_a_basis(moved=0.1)[0])
    rng = np.random.default_rng(4)
    patients = gather_patients(unit(9), rng.integers(0, CLASSES, 9), [f"p{row // 2}" for row in range(9)], 8)
    loss = class_prompt_patient_loss(torch.zeros(CLASSES, dtype=torch.float64))
    for batch in patients:
        ours, theirs = clipped_sum(adapter, batch, loss, 0.7), clipped_sum_by_hooks(adapter, batch, loss, 0.7)
        torch.testing.assert_close(ours["offsets"], theirs["offsets"].detach())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("rows", [1, 7])
def test_shapes_units_and_gradients(method, rows):
    adapter = build(method, change=0.1)
    x = torch.from_numpy(unit(rows))
    adapted, logits = adapter.adapt(x), adapter.logits(x)
    assert adapted.shape == (rows, DIM)
    assert logits.shape == (rows, CLASSES)
    torch.testing.assert_close(adapted.norm(dim=1), torch.ones(rows))
    torch.testing.assert_close(adapter.class_vectors().norm(dim=1), torch.ones(CLASSES))
    torch.testing.assert_close(logits, SCALE * adapted @ adapter.class_vectors().T)
    cross_entropy(logits, torch.zeros(rows, dtype=torch.long)).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in adapter.shared_parameters().values())


@pytest.mark.parametrize("method", METHODS)
def test_all_that_is_trained_is_shared_and_nothing_else_exists(method):
    adapter = build(method)
    adapter.set_statistics(torch.from_numpy(unit(9)))
    shared = adapter.shared_parameters()
    initial = initial_parameters(method, DIM, PROMPTS, 0)
    assert list(shared) == list(initial) == sorted(initial)
    assert {name: tuple(value.shape) for name, value in shared.items()} == {
        name: value.shape for name, value in initial.items()
    }
    assert list(adapter.buffers()) == []
    assert set(adapter.state_dict()) == set(shared)


def test_sizes_are_those_of_the_paper():
    prompts = unit(4, dim=512)
    sizes = [sum(v.size for v in initial_parameters(m, 512, prompts, 0).values()) for m in METHODS]
    assert sizes == [526_336, 526_336, 2 * 3 * 512, 4 * 512, 525_312]


@pytest.mark.parametrize("method", METHODS)
def test_initial_parameters_depend_on_the_seed_alone(method):
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = initial_parameters(method, DIM, PROMPTS, 7)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    again = initial_parameters(method, DIM, PROMPTS, 7)
    other = initial_parameters(method, DIM, PROMPTS, 8)
    assert all(np.array_equal(first[name], again[name]) for name in first)
    assert all(value.dtype == np.float64 for value in first.values())
    if method.adapter != "text_head":
        assert any(not np.array_equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize("method", [METHODS[0], METHODS[1], METHODS[4]])
def test_gates_start_near_zero_shot(method):
    # cos(I, a(I) * I) is about 0.92 at the start: the softmax of small numbers is nearly uniform.
    x = unit(64, dim=512)
    prompts = unit(4, seed=3, dim=512)
    adapter = build_adapter(method, prompts, SCALE, initial_parameters(method, 512, prompts, 3))
    cosine = (adapter.adapt(torch.from_numpy(x)).detach().numpy() * x).sum(axis=1)
    assert cosine.min() > 0.85
    assert cosine.max() < (0.9999 if method.adapter == "fedclip" else 0.999)  # without a norm nearer still


@pytest.mark.parametrize("method", METHODS[2:4])
def test_low_rank_and_text_head_start_at_zero_shot(method):
    x = unit(11)
    logits = build(method).logits(torch.from_numpy(x)).detach().numpy()
    np.testing.assert_allclose(logits, SCALE * x @ PROMPTS.T, atol=1e-4)


def test_layer_gate_is_the_papers_layers():
    adapter = build(METHODS[0], change=0.1)
    p = adapter.shared_parameters()
    layers = torch.nn.Sequential(
        torch.nn.Linear(DIM, DIM),
        torch.nn.LayerNorm(DIM),
        torch.nn.LeakyReLU(0.01),
        torch.nn.Linear(DIM, DIM),
        torch.nn.Softmax(dim=1),
    )
    names = ["first_weight", "first_bias", "norm_weight", "norm_bias", "second_weight", "second_bias"]
    with torch.no_grad():
        for target, name in zip(layers.parameters(), names, strict=True):
            target.copy_(p[name])
    x = torch.from_numpy(unit(6))
    torch.testing.assert_close(adapter.adapt(x), normalize(layers(x) * x, dim=1))


def test_fedclip_gate_is_the_papers_layers():
    adapter = build(METHODS[4], change=0.1)
    layers = torch.nn.Sequential(
        torch.nn.Linear(DIM, DIM), torch.nn.Tanh(), torch.nn.Linear(DIM, DIM), torch.nn.Softmax(dim=1)
    )
    names = ["first_weight", "first_bias", "second_weight", "second_bias"]
    with torch.no_grad():
        for target, name in zip(layers.parameters(), names, strict=True):
            target.copy_(adapter.shared_parameters()[name])
    x = torch.from_numpy(unit(6))
    torch.testing.assert_close(adapter.adapt(x), normalize(layers(x) * x, dim=1))


@pytest.mark.parametrize("adapter", ["text_head", "prompts"])
def test_a_domain_term_needs_features_that_move(adapter):
    method = Method(adapter=adapter, lmmd_weight=0.5)
    with pytest.raises(StudyError, match="moves no image feature"):
        initial_parameters(method, DIM, PROMPTS, 0)
    with pytest.raises(StudyError, match="expected 0"):
        build_adapter(method, PROMPTS, SCALE, {"offsets": PROMPTS.astype(float)})
    with pytest.raises(StudyError, match=r'adaptation = "adversarial": .* moves no image feature.*expected "none"'):
        initial_parameters(Method(adapter=adapter, adaptation="adversarial"), DIM, PROMPTS, 0)


def test_a_weight_of_what_nobody_asked_for_is_refused_in_a_template():
    """Its domain term would silently be none; a study that is made already says what it says."""
    alone = make_template(method={"adapter": "facmic", "adversarial_weight": 0.5})
    with pytest.raises(StudyError, match=r'adversarial_weight = 0.5 makes no difference without adaptation = "advers'):
        refuse_idle(alone)
    assert ignored(alone) == {"method.adversarial_weight": None}
    refuse_idle(alone.model_copy(update={"initial": "0" * 64}))
    for said in ("adversarial", "none"):
        refuse_idle(make_template(method={"adapter": "facmic", "adversarial_weight": 0.5, "adaptation": said}))


def test_private_head_adds_to_the_logits_and_is_not_shared():
    head = np.random.default_rng(5).normal(size=(CLASSES, DIM))
    parameters = initial_parameters(Method(), DIM, PROMPTS, 0)
    plain = build_adapter(Method(), PROMPTS, SCALE, parameters)
    personal = build_adapter(Method(private_head=True), PROMPTS, SCALE, parameters | {PRIVATE_HEAD: head})
    x = torch.from_numpy(unit(6))
    z = plain.adapt(x)
    expected = plain.logits(x) + SCALE * z @ torch.from_numpy(head).float().T
    torch.testing.assert_close(personal.logits(x), expected)
    torch.testing.assert_close(personal.compare(z), plain.logits(x))
    assert list(personal.shared_parameters()) == list(parameters)


def test_batch_gate_normalises_as_torch_does_and_takes_a_batch_of_one():
    adapter = build(METHODS[1], change=0.1)
    p = adapter.shared_parameters()
    x = torch.from_numpy(unit(6))
    hidden = x @ p["first_weight"].T + p["first_bias"]
    expected = torch.nn.functional.batch_norm(hidden, None, None, p["norm_weight"], p["norm_bias"], training=True)
    torch.testing.assert_close(adapter._batch_norm(hidden), expected)
    alone = adapter._batch_norm(hidden[:1])
    torch.testing.assert_close(alone, p["norm_bias"].expand(1, -1))


def test_batch_gate_evaluates_by_the_sites_own_statistics():
    adapter = build(METHODS[1], change=0.1)
    x, site = torch.from_numpy(unit(6)), torch.from_numpy(unit(40, seed=9))
    adapter.train()
    in_training = adapter.logits(x)
    adapter.eval()
    with pytest.raises(RuntimeError, match="set_statistics"):
        adapter.logits(x)
    adapter.set_statistics(x)
    torch.testing.assert_close(adapter.logits(x), in_training)
    adapter.set_statistics(site)
    rows = torch.cat([adapter.logits(row[None]) for row in x])
    torch.testing.assert_close(rows, adapter.logits(x))
    assert not torch.allclose(rows, in_training)


def test_class_prompt_loss_adjusts_by_the_prior():
    logits = torch.tensor([[1.0, 2.0, 3.0], [0.5, 0.1, 9.0]], requires_grad=True)
    prior = torch.tensor([0.25, 0.75, 0.0])
    losses = class_prompt_loss(logits, torch.tensor([0, 1]), torch.log(prior))
    for row, label, loss in zip(logits.tolist(), (0, 1), losses.tolist(), strict=True):
        weights = [share * math.exp(value) for share, value in zip(prior.tolist(), row, strict=True)]
        assert loss == pytest.approx(-math.log(weights[label] / sum(weights)), rel=1e-5)
    losses.sum().backward()
    assert logits.grad.isfinite().all()
    assert logits.grad[:, 2].tolist() == [0, 0]


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 20), st.integers(1, 6), st.integers(0, 1000))
def test_contrastive_loss_is_the_papers_and_its_image_half_a_prior_adjusted_loss(rows, classes, seed):
    rng = np.random.default_rng(seed)
    labels = torch.from_numpy(rng.integers(0, classes, rows))
    adapted = torch.from_numpy(unit(rows, seed=seed))
    prompts = torch.from_numpy(unit(classes, seed=seed + 1))
    losses = contrastive_loss(adapted, labels, prompts, SCALE)
    similarity = SCALE * adapted @ prompts[labels].T
    index = torch.arange(rows)
    paper = (cross_entropy(similarity, index) + cross_entropy(similarity.T, index)) / 2
    torch.testing.assert_close(losses.mean(), paper)
    # docs/facmic.md, The in-batch loss: the image-to-text half is CE(logits + log n_c) + log n_y.
    counts = torch.bincount(labels, minlength=classes)
    adjusted = class_prompt_loss(SCALE * adapted @ prompts.T, labels, torch.log(counts)) + torch.log(counts[labels])
    image_half = 2 * losses - cross_entropy(similarity.T, index, reduction="none")
    torch.testing.assert_close(image_half, adjusted, atol=2e-4, rtol=1e-4)


def test_contrastive_loss_of_a_perfect_classifier_is_log_of_its_classes_images():
    prompts = torch.eye(4)
    labels = torch.arange(4).repeat(8)
    loss = contrastive_loss(prompts[labels], labels, prompts, 100.0).mean()
    assert loss.item() == pytest.approx(math.log(8), abs=1e-3)


def test_a_head_of_moments_knows_where_a_class_lies_and_how_it_spreads_in_the_backbones_coordinates() -> None:
    rng = np.random.default_rng(2)
    method = Method(adapter="gaussian_head", shrinkage=0.1)
    factor, means = np.tril(rng.normal(size=(3, 3))), rng.normal(size=(4, 3))
    basis = Basis(rng.normal(size=8), rng.normal(size=(3, 8)), 0.7, np.ones(3))
    prompts = rng.normal(size=(4, 8)).astype(np.float32)
    parameters = {"weight": np.zeros((4, 8)), "bias": np.zeros(4), "factor": factor, "means": means}
    parameters["limits"] = np.zeros(3)
    found = build_adapter(method, prompts, SCALE, parameters, basis=basis).within_class(2)
    assert found is not None
    mean, spread = found
    assert basis.axes is not None
    into = basis.axes / basis.radius
    np.testing.assert_allclose(basis.linear(mean[None])[0], means[2], rtol=1e-9)
    np.testing.assert_allclose(into @ spread @ into.T, factor @ factor.T, rtol=1e-9)
    assert np.linalg.matrix_rank(spread) == 3
    whole = build_adapter(method, prompts, SCALE, parameters, basis=Basis(np.zeros(3), None, 2.0, np.ones(3)))
    mean, spread = whole.within_class(0) or (None, None)
    np.testing.assert_allclose(mean, 2 * means[0])
    np.testing.assert_allclose(spread, 4 * factor @ factor.T)
    assert build_adapter(method, prompts, SCALE, parameters).within_class(0) is None
    assert (
        build_adapter(Method(), PROMPTS, SCALE, initial_parameters(Method(), 512, PROMPTS, 3)).within_class(0) is None
    )
