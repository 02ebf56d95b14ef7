import math

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from secure_fed.clients.lmmd import lmmd
from secure_fed.model.adapters import build_adapter, initial_parameters
from secure_fed.protocol.study_tables import Method

torch.set_num_threads(1)


def by_loops(source, labels, target, probabilities):
    """The formula of docs/facmic.md, LMMD, term by term."""
    points = [*source, *target]
    distance = [[sum((a - b) ** 2 for a, b in zip(u, v, strict=True)) for v in points] for u in points]
    count, m = len(points), len(source)
    bandwidth = sum(map(sum, distance)) / (count * (count - 1)) / 4

    def kernel(i, j):
        return sum(math.exp(-distance[i][j] / (bandwidth * 2**k)) for k in range(5))

    guessed = {max(range(len(row)), key=row.__getitem__) for row in probabilities}
    common = sorted(set(labels) & guessed)
    total = 0.0
    for c in common:
        members = labels.count(c)
        mass = sum(row[c] for row in probabilities)
        w = [(label == c) / members for label in labels]
        v = [row[c] / mass for row in probabilities]
        for i in range(m):
            total += sum(w[i] * w[j] * kernel(i, j) for j in range(m))
            total -= 2 * sum(w[i] * v[j] * kernel(i, m + j) for j in range(len(target)))
        for i in range(len(target)):
            total += sum(v[i] * v[j] * kernel(m + i, m + j) for j in range(len(target)))
    return total / len(common) if common else 0.0


def batch(rng, m, n, classes, dim=4):
    source, target = rng.normal(size=(m, dim)), rng.normal(size=(n, dim)) + 0.5
    labels = rng.integers(0, classes, m)
    scores = np.exp(2 * rng.normal(size=(n, classes)))
    return source, labels, target, scores / scores.sum(axis=1, keepdims=True)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 7), st.integers(1, 7), st.integers(2, 9), st.integers(0, 10_000))
def test_equals_the_formula_for_any_sizes_and_classes(m, n, classes, seed):
    source, labels, target, probabilities = batch(np.random.default_rng(seed), m, n, classes)
    expected = by_loops(source.tolist(), labels.tolist(), target.tolist(), probabilities.tolist())
    found = lmmd(*map(torch.from_numpy, (source, labels, target, probabilities)))
    assert abs(found.item() - expected) < 1e-9


def test_float32_and_nearby_points_keep_the_formulas_digits():
    rng = np.random.default_rng(3)
    source, labels, target, probabilities = batch(rng, 8, 6, 3)
    # Unit features of a frozen CLIP lie in a narrow cone.
    source, target = 1 + 1e-2 * source, 1 + 1e-2 * target
    exact = by_loops(source.tolist(), labels.tolist(), target.tolist(), probabilities.tolist())
    single = lmmd(
        torch.tensor(source, dtype=torch.float32),
        torch.from_numpy(labels),
        torch.tensor(target, dtype=torch.float32),
        torch.tensor(probabilities, dtype=torch.float32),
    )
    assert abs(single.item() - exact) < 1e-4 * exact


def test_no_common_class_gives_zero_with_a_gradient():
    source = torch.randn(3, 4, requires_grad=True)
    loss = lmmd(source, torch.tensor([0, 0, 1]), torch.randn(2, 4), torch.tensor([[0.1, 0.2, 0.7]] * 2))
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(source.grad, torch.zeros(3, 4))


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 7), st.integers(1, 7), st.integers(2, 5), st.integers(0, 10_000))
def test_gradient_is_right_and_takes_the_bandwidth_as_a_constant(m, n, classes, seed):
    rng = np.random.default_rng(seed)
    source, labels, target, probabilities = map(torch.from_numpy, batch(rng, m, n, classes))
    points = torch.cat((source, target))
    bandwidth = (torch.cdist(points, points) ** 2).sum() / ((m + n) * (m + n - 1)) / 4

    def with_fixed_bandwidth(moved):
        both = torch.cat((moved, target))
        squares = ((both[:, None] - both[None]) ** 2).sum(2)
        kernel = sum(torch.exp(-squares / (bandwidth * 2**k)) for k in range(5))
        common = [c for c in range(classes) if c in labels and c in probabilities.argmax(1)]
        total = torch.zeros((), dtype=torch.float64)
        for c in common:
            w = (labels == c).double()
            v = probabilities[:, c]
            signed = torch.cat((w / w.sum(), -v / v.sum()))
            total = total + signed @ kernel @ signed
        return total / max(len(common), 1) + 0 * moved.sum()  # without a common class it still has a gradient

    first, second = source.clone().requires_grad_(), source.clone().requires_grad_()
    # A factor, since the term is weighted.
    (3 * lmmd(first, labels, target, probabilities)).backward()
    (3 * with_fixed_bandwidth(second)).backward()
    torch.testing.assert_close(first.grad, second.grad)


def test_equal_points_give_no_nan():
    source = torch.ones(4, 3, requires_grad=True)
    loss = lmmd(source, torch.tensor([0, 0, 1, 1]), torch.ones(2, 3), torch.tensor([[0.9, 0.1], [0.2, 0.8]]))
    loss.backward()
    assert abs(loss.item()) < 1e-5
    assert source.grad.isfinite().all()


def test_steps_on_this_term_alone_lower_it_under_a_scanner_shift():
    # The same classes seen by two scanners: the second adds one fixed direction to every feature.
    rng = np.random.default_rng(0)
    dim, classes = 32, 3
    centres = rng.normal(size=(classes, dim))
    shift = 1.5 * rng.normal(size=dim)

    def scan(rows, offset):
        labels = rng.integers(0, classes, rows)
        x = centres[labels] + 0.3 * rng.normal(size=(rows, dim)) + offset
        return torch.tensor(x / np.linalg.norm(x, axis=1, keepdims=True), dtype=torch.float32), labels

    source, labels = scan(60, 0)
    target, hidden = scan(45, shift)
    probabilities = torch.nn.functional.one_hot(torch.from_numpy(hidden), classes).float() * 0.9 + 0.1 / classes
    prompts = (centres / np.linalg.norm(centres, axis=1, keepdims=True)).astype(np.float32)
    for method in (Method(), Method(norm="batch"), Method(adapter="low_rank", rank=4)):
        adapter = build_adapter(method, prompts, 10.0, initial_parameters(method, dim, prompts, 0))
        optimizer = torch.optim.Adam(adapter.parameters(), lr=5e-3)
        values = []
        for _ in range(60):
            loss = lmmd(adapter.adapt(source), torch.from_numpy(labels), target, probabilities)
            values.append(loss.item())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        assert values[1] < values[0], method
        assert values[-1] < 0.7 * values[0], method
