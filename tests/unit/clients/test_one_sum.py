"""What a site counts for one sum: patients judged by heads that do not know them."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from secure_fed.clients import one_sum as at_site
from secure_fed.clients.one_sum import _Eigen, _left_out
from secure_fed.privacy.class_statistics import exact_sums, shares
from secure_fed.protocol import aggregation, one_sum
from secure_fed.protocol.one_sum import GRID

CLASSES = 3


@settings(deadline=None, max_examples=15)
@given(st.integers(0, 2**20), st.integers(2, 9), st.integers(20, 60))
def test_a_patient_is_judged_by_the_head_of_the_sums_without_it(seed: int, size: int, images: int) -> None:
    rng = np.random.default_rng(seed)
    x, labels = rng.standard_normal((images, size)), np.resize(np.arange(CLASSES), images)
    x += labels[:, None]
    seen, owners = 1.5 * x, [f"p{number}" for number in rng.integers(0, images // 2, images)]
    whole = exact_sums(x, labels, owners, CLASSES)
    of_owner = {owner: np.bincount(labels[[o == owner for o in owners]], minlength=CLASSES) for owner in owners}
    weights = np.array([counts / counts.sum() for counts in of_owner.values()])
    # Without whom less than one patient of a class is left is not counted: the next test.
    assume(not np.any((weights.sum(axis=0) - weights < 1) & (weights > 0)))
    found = _left_out(_Eigen.of(whole, np.ones(CLASSES, dtype=bool)), x, seen, labels, owners)
    assert len(found.labels) == images
    assert np.allclose(np.sort(found.each), np.sort(shares(owners)))  # under each shrinkage
    start = 0
    for owner in dict.fromkeys(owners):
        rows = [row for row in range(images) if owners[row] == owner]
        rest = [row for row in range(images) if owners[row] != owner]
        sums = exact_sums(x[rest], labels[rest], [owners[row] for row in rest], CLASSES)
        place = slice(start, start + len(rows))
        start += len(rows)
        for index, shrinkage in enumerate(GRID):
            head = one_sum.solve(sums, shrinkage, 1)
            assert head is not None
            expected = seen[rows] @ head.weight.T + head.bias
            scale = max(1.0, float(np.abs(expected).max()))
            assert np.allclose(found.logits[index][place], expected, atol=1e-6 * scale)
            apart = np.linalg.solve(head.factor, (seen[rows][:, None] - head.means).reshape(-1, size).T)
            squared = np.square(apart).sum(axis=0).reshape(len(rows), CLASSES).min(axis=1) / size
            assert np.allclose(found.distances[index][place], squared, rtol=1e-5)


def test_a_patient_without_whom_a_class_is_empty_is_not_counted() -> None:
    x, labels = np.random.default_rng(1).standard_normal((21, 4)), np.array([0] * 10 + [1] * 10 + [2])
    owners = [str(number) for number in range(21)]
    head = _Eigen.of(exact_sums(x, labels, owners, CLASSES), np.ones(CLASSES, dtype=bool))
    found = _left_out(head, x, x, labels, owners)
    assert found.labels.tolist() == [0] * 10 + [1] * 10
    alone = _left_out(head, x[-1:], x[-1:], labels[-1:], owners[-1:])
    assert alone.logits.shape == (len(GRID), 0, CLASSES)


def test_what_is_left_out_is_as_uncertain_as_what_was_never_seen() -> None:
    rng = np.random.default_rng(2)
    centres = rng.standard_normal((CLASSES, 40))

    def drawn(count: int) -> tuple[np.ndarray, np.ndarray, list[str]]:
        labels = rng.integers(0, CLASSES, count)
        return centres[labels] + 3 * rng.standard_normal((count, 40)), labels, [str(number) for number in range(count)]

    x, labels, owners = drawn(150)
    sums = exact_sums(x, labels, owners, CLASSES)
    head = _Eigen.of(sums, np.ones(CLASSES, dtype=bool))
    fresh, truth, _ = drawn(3000)
    place = GRID.index(1e-2)
    left = np.mean(_left_out(head, x, x, labels, owners).logits[place].argmax(axis=1) == labels)
    known = np.mean(head.scores(x, place)[0].argmax(axis=1) == labels)
    unknown = np.mean(head.scores(fresh, place)[0].argmax(axis=1) == truth)
    assert known > unknown + 0.1
    assert left == pytest.approx(unknown, abs=0.08)


def test_fewer_patients_than_dimensions_are_judged_under_every_shrinkage_that_outweighs_what_rounding_left() -> None:
    rng, size, images = np.random.default_rng(3), 100, 30
    x, labels = rng.standard_normal((images, size)), np.resize(np.arange(CLASSES), images)
    owners = [str(number) for number in range(images)]
    exact = exact_sums(x, labels, owners, CLASSES)
    error = 0.05 * rng.standard_normal((size, size))
    rounded = replace(exact, second=exact.second + error + error.T)
    known = np.ones(CLASSES, dtype=bool)
    found = _left_out(_Eigen.of(rounded, known), x, x, labels, owners)
    counted = found.each.sum(axis=1)
    assert counted[0] < images
    assert counted[GRID.index(0.1)] == images
    assert np.all(np.diff(counted) >= 0)
    truly = _left_out(_Eigen.of(exact, known), x, x, labels, owners)
    place = GRID.index(0.3)
    assert np.abs(found.logits[place] - truly.logits[place]).max() < 0.1 * np.abs(truly.logits[place]).max()


def test_a_class_that_is_a_part_of_a_patient_short_is_not_told_as_having_enough(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A patient with images of two classes counts in both, in parts."""
    method = SimpleNamespace(min_patients=5)
    agreed = SimpleNamespace(study=SimpleNamespace(method=method, class_names=("a", "b", "c")))
    sums = one_sum.Sums(np.array([9.0, 4.75, 8.0]), np.ones((3, 2)), np.eye(2))
    state = {f"{aggregation.MOMENT}{name}": value for name, value in sums.values().items()}
    at_site.tell(agreed, state)  # type: ignore[arg-type]
    assert "class b has 4.75 patients in the sum of all sites; expected at least 5" in caplog.text
    assert caplog.text.count("left out of the head") == 1
