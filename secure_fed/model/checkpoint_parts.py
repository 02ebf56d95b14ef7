"""Which tensors of a checkpoint are the model's: out of its tables, from under their prefixes, copies apart."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from secure_fed.core.errors import BackboneError

Tensors = dict[str, Tensor]

WRAPPERS = ("state_dict", "model_state_dict", "model", "net", "network", "module")
"""Where a training checkpoint keeps its weights, the likeliest first."""

WRAPPER = re.compile(
    r"(?:(?<=\.)|^)(?:_orig_mod|_fsdp_wrapped_module|_fpw_module|_checkpoint_wrapped_module)\.|(?<=\.)module\."
)
"""What torch's wrappers put into names, anywhere: ``torch.compile``, FSDP (its older name too), checkpointing; and
``module.`` within a name, where one tower alone was trained in parallel."""

_OF_TRAINING = re.compile(r"optim|sched|scaler|^loops$")
"""Keys under which a training keeps what is of itself."""

_FEWEST = 16
"""Tensors that a table of weights holds at least: a CLIP of one layer a tower has twice as many."""


def type_of(value: Tensor) -> str:
    """The type of a tensor's values, in a word."""
    return str(value.dtype).removeprefix("torch.")


def quantised(where: Path | str, name: str, kind: str) -> BackboneError:
    """What to say of values that are not the model's own any more."""
    return BackboneError(
        f"{where}: quantised weights ({name}, {kind}); expected float32, float16 or bfloat16, from which alone "
        "features are the model's own: get the weights before they were quantised"
    )


def tables_in(content: Any, name: str = "", depth: int = 0) -> dict[str, Tensors]:
    """Tables of tensors in what a training program saved, by the keys that they lie under; of lists by number."""
    if isinstance(content, list | tuple):
        content = {str(number): value for number, value in enumerate(content)}
    if not isinstance(content, Mapping):
        return {}
    tensors = {str(key): value for key, value in content.items() if isinstance(value, Tensor)}
    found = {name: tensors} if tensors else {}
    for key, value in content.items():
        if depth < 3 and not _OF_TRAINING.search(str(key)):
            found |= tables_in(value, f"{name}.{key}" if name else str(key), depth + 1)
    return found


def the_weights(path: Path, tables: Mapping[str, Tensors], beside: list[str] | None) -> Tensors:
    """Of all tables of tensors in a file, the model's; the names in the others are added to ``beside``."""
    named = {name: table for name, table in tables.items() if not any(key.isdecimal() for key in table)}
    if not named:
        raise BackboneError(
            f"{path}: holds no tensors by name; expected a checkpoint with a state_dict: save the model's state_dict()"
        )
    large = {name: table for name, table in named.items() if len(table) >= _FEWEST} or named
    usual = [name for name in large if not name or set(name.split(".")) <= set(WRAPPERS)]
    if usual:
        chosen = min(usual, key=lambda name: [WRAPPERS.index(part) for part in name.split(".") if part])
    elif all(_same(table, next(iter(large.values()))) for table in large.values()):
        chosen = next(iter(large))
    else:
        raise BackboneError(
            f"{path}: holds several sets of weights, {', '.join(sorted(large))}; expected one, as state_dict: "
            "save the one that is meant by itself"
        )
    found = named[chosen]
    for name, table in tables.items():
        if name != chosen and _is_second(found, table):
            raise BackboneError(
                f"{path}: holds two sets of weights of one model that differ, {chosen or 'its own'} and "
                f"{name or 'its own'} (as a training keeps averages beside the last ones); expected one: save the one "
                "that is meant by itself, as state_dict"
            )
    if beside is not None:
        plain = {_unwrapped(name): value for name, value in found.items()}
        beside += [
            f"{table}.{name}" if table else name
            for table in tables
            if table != chosen
            for name, value in tables[table].items()
            if not _is_of_training(table, value)
            and ((own := plain.get(_unwrapped(name))) is None or not _equal(own, value))
        ]
    return found


def _is_of_training(table: str, value: Tensor) -> bool:
    """Whether a tensor beside a model is a count, the state of a generator, or a figure that a callback kept."""
    counts = value.ndim < 2 and not value.is_floating_point()
    return counts or (table.split(".")[0] == "callbacks" and value.numel() == 1)


def _is_second(found: Tensors, other: Tensors) -> bool:
    """Whether another table is of the same model, most of its shapes among it or its very names, with other values."""
    plain, others = ({_unwrapped(name): one for name, one in table.items()} for table in (found, other))
    both = [(value, others[name]) for name, value in plain.items() if name in others and value.ndim]
    if any(first.shape == second.shape and not torch.equal(first, second) for first, second in both):
        return True  # as a part that was trained, beside the whole before
    shapes, more = (Counter(tuple(one.shape) for one in table.values()) for table in (found, other))
    if 2 * (shapes & more).total() < len(found):
        return False
    same = [name for name in plain if name in others]
    return len(same) < len(others) or any(not torch.equal(plain[name], others[name]) for name in same)


def _unwrapped(name: str) -> str:
    return WRAPPER.sub("", name).removeprefix("module.")


def without_prefix(
    tensors: Tensors, anchors: Mapping[str, tuple[int, ...] | None], where: Path | str, rest: Collection[str] = ()
) -> tuple[Tensors, list[str], str | None]:
    """The tensors under the names that their model has, whatever a training program put before them.

    Args:
        tensors: of a checkpoint; what is of :data:`WRAPPER` may stand anywhere, and other prefixes, as ``module.`` or
            Lightning's ``model.``, in front.
        anchors: names of the model that show where it begins, and their shapes, so that a teacher of another size
            beside it is passed over; None where any shape will do.
        where: the file, for messages.
        rest: all other names of the model, for one whose towers lie under prefixes of their own.

    Returns:
        The model's tensors, the names of what lies beside them, equal copies of them apart, and where the rest of it
        lay if that was elsewhere.

    Raises:
        BackboneError: the model is in it twice, or a part of it with other values beside the whole.
    """
    plain: Tensors = {}
    for name, value in tensors.items():
        short = WRAPPER.sub("", name)
        if short in plain and not _equal(plain[short], value):
            wrapper = next(
                found[0] for one in tensors if WRAPPER.sub("", one) == short and (found := WRAPPER.search(one))
            )
            raise BackboneError(
                f"{where}: holds {short} twice with other values, with and without {wrapper}; expected one model: "
                "save the one that is meant by itself"
            )
        plain[short] = value
    tails = {anchor.rsplit(".", 2)[-1] for anchor in anchors}
    counts: Counter[str] = Counter()
    fitting: Counter[str] = Counter()
    for name, value in plain.items():
        if name.rsplit(".", 1)[-1] not in tails:
            continue
        parts = name.split(".")
        for start in range(min(len(parts), 6)):
            anchor = ".".join(parts[start:])
            if anchor in anchors:
                prefix = ".".join(parts[:start])
                counts[prefix] += 1
                fitting[prefix] += anchors[anchor] in (None, tuple(value.shape))
                break
    counts = +fitting or counts  # where no shape fits, the load will say so
    if not counts:
        return plain, [], None
    ((prefix, most), *others) = counts.most_common()
    if others and 2 * others[0][1] > most and _differ(plain, prefix, others[0][0]):
        raise _twice(where, "the model", prefix, others[0][0])
    apart = _fetch_apart(plain, f"{prefix}." if prefix else "", anchors, rest)
    if not prefix:
        copies = _copies(plain)
        return {name: value for name, value in plain.items() if name not in copies}, [], apart
    model: Tensors = {name[len(prefix) + 1 :]: value for name, value in plain.items() if name.startswith(f"{prefix}.")}
    second: dict[str, list[tuple[Tensor, Tensor]]] = {}
    beside: list[str] = []
    for name, value in plain.items():
        if name.startswith(f"{prefix}."):
            continue
        words = name.split(".")
        tail = next((one for start in range(len(words)) if (one := ".".join(words[start:])) in model), None)
        if tail is not None:
            second.setdefault(name.removesuffix(tail).rstrip("."), []).append((model[tail], value))
        if not _is_of_training("", value) and (tail is None or not _equal(model[tail], value)):
            beside.append(name)
    for other, pairs in second.items():
        # One tensor of another shape, and it is another model, such as a teacher.
        if all(one.shape == value.shape for one, value in pairs) and any(
            value.ndim and not torch.equal(one, value) for one, value in pairs
        ):
            raise _twice(where, "a part of the model", prefix, other)
    return model, beside, apart


def _fetch_apart(tensors: Tensors, prefix: str, anchors: Collection[str], rest: Collection[str]) -> str | None:
    """Put the rest of a model under its prefix where nothing but its scale is there, and each of it once elsewhere.

    Returns:
        The prefix under which it lay, unless that is open_clip's other one; None if nothing was moved.
    """
    lost = [name for name in rest if prefix + name not in tensors]
    if not lost or set(rest) - set(lost) - {"logit_scale"}:
        return None
    own = {prefix + name for name in anchors}
    others = [name for name in tensors if name not in own]
    places = {name: [one for one in others if one == name or one.endswith(f".{name}")] for name in lost}
    if any(len(found) != 1 for found in places.values()):
        return None
    for name, (found,) in places.items():
        tensors[prefix + name] = tensors.pop(found)
    longest = max(sorted(lost), key=len)
    place = places[longest][0].removesuffix(longest)
    return None if place == f"{prefix}text." else place


def _twice(where: Path | str, what: str, prefix: str, other: str) -> BackboneError:
    return BackboneError(
        f"{where}: holds {what} twice, under {prefix or '(nothing)'} and {other or '(nothing)'}, "
        "with other values; expected one: save the one that is meant by itself"
    )


def _copies(tensors: Tensors) -> set[str]:
    """Names under prefixes under which each tensor is one that stands without it too, with the same values."""
    under: dict[str, list[str]] = {}
    for name in tensors:
        for place in re.finditer(r"\.", name):
            under.setdefault(name[: place.end()], []).append(name)
    copies: set[str] = set()
    for prefix, names in under.items():
        kept = [name for name in names if not _is_of_training("", tensors[name])]
        own = [tensors.get(name.removeprefix(prefix)) for name in kept]
        if kept and all(one is not None and _equal(one, tensors[name]) for one, name in zip(own, kept, strict=True)):
            copies |= set(names)
    return copies


def _same(first: Tensors, second: Tensors) -> bool:
    return first.keys() == second.keys() and all(_equal(first[name], second[name]) for name in first)


def _equal(first: Tensor, second: Tensor) -> bool:
    return (first.shape, first.dtype) == (second.shape, second.dtype) and torch.equal(first, second)


def _differ(tensors: Tensors, first: str, second: str) -> bool:
    """Whether what lies under two prefixes has other values."""
    starts = [f"{prefix}." if prefix else "" for prefix in (first, second)]
    pairs = [
        (value, tensors[starts[0] + name.removeprefix(starts[1])])
        for name, value in tensors.items()
        if name.startswith(starts[1]) and starts[0] + name.removeprefix(starts[1]) in tensors
    ]
    return any(not torch.equal(one, other) for one, other in pairs)
