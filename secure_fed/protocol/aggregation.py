"""What every site makes of a round's average update: server-free optimisers on the decrypted sum.

The usual federated optimisers run at a server that sees the average. Here each site applies the same rule to the same
average, in elementwise float64 numpy (sums, products, quotients and square roots, which IEEE 754 rounds correctly), so
that all sites keep the same state, bit for bit, on any CPU. The state is the adapter and the rule's moments; it
follows from the journal alone.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from secure_fed.protocol import codec, memory, one_sum
from secure_fed.protocol.codec import Parameters
from secure_fed.protocol.initial_state import InitialState
from secure_fed.protocol.study import AgreedStudy, Study
from secure_fed.protocol.study_tables import Aggregation

MOMENT = "moment."
"""What the names of moments begin with in a state; names of an adapter's parameters have no dot."""

State = dict[str, NDArray[np.float64]]
"""The adapter's parameters and the rule's moments, by name."""

_FIRST, _SECOND = f"{MOMENT}first", f"{MOMENT}second"
_MEAN, _ROUNDS = f"{MOMENT}mean", f"{MOMENT}rounds"


def initial_state(rule: Aggregation, adapter: Parameters) -> State:
    """The state before the first round: the adapter by name and, for rules that keep any, flat moments [values].

    ``fedadam`` starts its second moment at tau^2, the least that algorithm 2 of arXiv 2003.00295 allows. With
    ``iterates = "mean"`` or ``"late"`` there are also the mean of the adapters after each round, and of how many [1].
    """
    values = sum(value.size for value in adapter.values())
    state: State = dict(adapter)
    if rule.rule != "average":
        state[_FIRST] = np.zeros(values)
    if rule.rule == "fedadam":
        state[_SECOND] = np.full(values, rule.tau * rule.tau)
    if rule.iterates != "last":
        state[_MEAN] = codec.flatten(adapter)
        state[_ROUNDS] = np.zeros(1)
    return state


def apply(rule: Aggregation, state: State, update: NDArray[np.float64]) -> State:
    """The state after a round.

    With the average update D, the adapter x and moments m, v:

    - ``average``: x + D.
    - ``fedavgm`` (arXiv 1909.06335, section 4.2): m' = beta_1 m + D; x + eta m'.
    - ``fedadam`` (arXiv 2003.00295, algorithm 2): m' = beta_1 m + (1 - beta_1) D;
      v' = beta_2 v + (1 - beta_2) D^2; x + eta m' / (sqrt(v') + tau).

    Args:
        rule: the study's.
        state: as :func:`initial_state` or this function gave it; left as it is.
        update: D, float64 [values], in the flat order of the adapter's sorted names.
    """
    adapter = adapter_of(state)
    moments: State = {}
    step = update
    if rule.rule == "fedavgm":
        moments[_FIRST] = rule.betas[0] * state[_FIRST] + update
        step = rule.learning_rate * moments[_FIRST]
    elif rule.rule == "fedadam":
        first, second = rule.betas
        moments[_FIRST] = first * state[_FIRST] + (1 - first) * update
        moments[_SECOND] = second * state[_SECOND] + (1 - second) * (update * update)
        step = rule.learning_rate * moments[_FIRST] / (np.sqrt(moments[_SECOND]) + rule.tau)
    after = codec.flatten(adapter) + step
    if rule.iterates != "last":
        moments[_ROUNDS] = state[_ROUNDS] + 1
        among = _among(rule, float(moments[_ROUNDS][0]))
        moments[_MEAN] = after if not state[_ROUNDS][0] else state[_MEAN] + (after - state[_MEAN]) / among
    shapes = {name: value.shape for name, value in adapter.items()}
    return codec.unflatten(after, shapes) | moments


def _among(rule: Aggregation, rounds: float) -> float:
    """Among how many equals the last of so many adapters counts in their mean.

    Of ``late`` each weighs the square t^2 of its round, of t (t + 1) (2 t + 1) / 6 in all: means that forget where they
    began (Shamir and Zhang, arXiv 1212.1824).
    """
    return rounds if rule.iterates == "mean" else (rounds + 1.0) * (2.0 * rounds + 1.0) / (6.0 * rounds)


def start(agreed: AgreedStudy) -> State:
    """The state of a study before its first round; all that it will ever hold has its place in it."""
    study, adapter = agreed.study, agreed.initial.adapter
    if study.task == "anomaly":
        return dict(adapter)
    if not study.method.one_sum:
        return initial_state(study.aggregation, adapter)
    held = [block for number in range(1, study.rounds + 1) for block in agreed.layout(number).blocks]
    return {**adapter, **{f"{MOMENT}{block.name}": np.zeros(block.bounds.size) for block in held}}


def after_round(agreed: AgreedStudy, state: State, found: Mapping[str, NDArray[np.float64]]) -> State:
    """The state after a round of a study.

    Args:
        agreed: the study.
        state: before it; left as it is.
        found: what the round's sums stand for, by block (:meth:`secure_fed.protocol.codec.Layout.decode`).
    """
    if agreed.study.task == "anomaly":
        return memory.moved(state, found, agreed.study.method.min_patients)
    if not agreed.study.method.one_sum:
        return apply(agreed.study.aggregation, state, found[codec.UPDATE])
    held = {name.removeprefix(MOMENT): value for name, value in state.items() if name.startswith(MOMENT)}
    held |= found
    adapter = one_sum_adapter(agreed.study, agreed.initial, held, adapter_of(state))
    return {**adapter, **{f"{MOMENT}{name}": value for name, value in held.items()}}


def one_sum_adapter(
    study: Study, initial: InitialState, held: Mapping[str, NDArray[np.float64]], before: Parameters
) -> Parameters:
    """The adapter that a study's sums, and histograms if there are any, give.

    Args:
        study: whose method is ``gaussian_head``.
        initial: its basis and logit scale.
        held: blocks by name.
        before: what stays if fewer than two classes have enough patients.
    """
    method, basis = study.method, initial.basis
    assert basis is not None, "study new makes one for each method that uses one"
    shrinkage, limits = method.shrinkage, one_sum.NO_LIMITS
    histograms = held.get(one_sum.HISTOGRAMS)
    if histograms is not None and histograms.any():
        place, histogram = one_sum.chosen(histograms, len(study.classes))
        shrinkage, limits = one_sum.GRID[place], one_sum.limits_of(histogram, method.coverage)
    head = one_sum.head_of(one_sum.Sums.of(held), shrinkage, method.min_patients)
    if head is None:
        return before
    return one_sum.parameters_of(head, basis, initial.logit_scale) | {"limits": limits.values()}


def validation_counts(agreed: AgreedStudy, found: Mapping[str, NDArray[np.float64]]) -> tuple[int, int] | None:
    """How many validation images a round's sums counted, and correct ones among them; None if the round counts none.

    Args:
        agreed: the study.
        found: as for :func:`after_round`. Of one sum's histograms, patients under the chosen shrinkage.

    Returns:
        As they were sent, which may be what no images give.
    """
    if codec.COUNTS in found:
        images, correct = (int(count) for count in found[codec.COUNTS])
        return images, correct
    if one_sum.HISTOGRAMS in found:
        histogram = one_sum.chosen(found[one_sum.HISTOGRAMS], len(agreed.study.classes))[1]
        return round(histogram.patients), round(float(histogram.confusion.trace()))
    return None


def most_validated(agreed: AgreedStudy, members: int) -> int:
    """How many validation images, or of one sum patients, so many members can have counted: each has a bound."""
    study = agreed.study
    return members * (2 * study.method.most_patients if study.method.sums else codec.MOST_COUNTED)


def adapter_of(state: State) -> Parameters:
    """The adapter's parameters in a state, at which the next round begins."""
    return {name: value for name, value in state.items() if not name.startswith(MOMENT)}


def result_of(state: State) -> Parameters:
    """The adapter that is evaluated and used: a mean of those after each round where the study asks for it."""
    adapter = adapter_of(state)
    if _MEAN not in state:
        return adapter
    return codec.unflatten(state[_MEAN], {name: value.shape for name, value in adapter.items()})
