"""One round of Flower's own secure aggregation, its arithmetic alone: a rival row of ``wire.py``.

Drives the four stages of flwr's SecAgg+ mod in the order in which its workflow runs them, without messages, and adds
and unmasks as that workflow does (checked with flwr 1.41). Every site is every other's neighbour, so that as in ours
nobody but all others together could open an update; nobody drops out. Ranges are the workflow's defaults. Prints one
JSON line.

    python secagg_round.py --values 526336 --clients 16
"""

from __future__ import annotations

import argparse
import importlib
import json
import logging
import resource
import time
from typing import Any

import numpy as np
from flwr.common import bytes_to_ndarray, ndarray_to_bytes, ndarrays_to_parameters
from flwr.common.secure_aggregation.crypto.shamir import combine_shares
from flwr.common.secure_aggregation.ndarrays_arithmetic import (
    factor_extract,
    get_parameters_shape,
    parameters_addition,
    parameters_mod,
    parameters_subtraction,
)
from flwr.common.secure_aggregation.quantization import dequantize
from flwr.common.secure_aggregation.secaggplus_constants import Key
from flwr.common.secure_aggregation.secaggplus_utils import pseudo_rand_gen

mod = importlib.import_module("flwr.client.mod.secure_aggregation.secaggplus_mod")  # its package has it as a function

CLIP, QUANTIZED, MODULUS, WEIGHT = 0.01, 2**22, 2**32, 1000.0
"""Our bound, and the workflow's defaults."""


def update_of(client: int, values: int) -> np.ndarray:
    """The same update as wire.py's site of that number."""
    return np.random.default_rng([7, client]).normal(0, 1e-3, values).clip(-CLIP, CLIP)


def size_of(said: dict[str, Any]) -> int:
    """Bytes of a stage's values, without those of their messages."""
    return sum(len(one) if isinstance(one, bytes) else 8 for value in said.values() for one in _listed(value))


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def play(values: int, count: int) -> dict[str, Any]:
    """A round; seconds by site at sites and server, bytes up and down of one site."""
    threshold, numbers = count // 2 + 1, list(range(1, count + 1))
    sites = {number: mod.SecAggPlusState() for number in numbers}
    seconds, up, down = dict.fromkeys(numbers, 0.0), dict.fromkeys(numbers, 0), dict.fromkeys(numbers, 0)

    def stage(number: int, work: Any, configs: dict[str, Any], *more: Any) -> dict[str, Any]:
        start = time.perf_counter()
        said: dict[str, Any] = work(sites[number], configs, *more)
        seconds[number] += time.perf_counter() - start
        up[number] += size_of(said)
        return said

    setup = {
        Key.SAMPLE_NUMBER: count, Key.SHARE_NUMBER: count, Key.THRESHOLD: threshold, Key.CLIPPING_RANGE: CLIP,
        Key.TARGET_RANGE: QUANTIZED, Key.MOD_RANGE: MODULUS, Key.MAX_WEIGHT: WEIGHT,
    }  # fmt: skip
    public = {}
    for number in numbers:
        sites[number].nid = number
        said = stage(number, mod._setup, setup)
        public[str(number)] = (said[Key.PUBLIC_KEY_1], said[Key.PUBLIC_KEY_2])
    sealed: dict[int, dict[int, bytes]] = {number: {} for number in numbers}
    for number in numbers:
        down[number] += sum(map(len, (key for pair in public.values() for key in pair)))
        said = stage(number, mod._share_keys, public)
        for to, text in zip(said[Key.DESTINATION_LIST], said[Key.CIPHERTEXT_LIST], strict=True):
            sealed[to][number] = text
    total, server, expected = None, [], np.zeros(values)
    for number in numbers:
        update = update_of(number - 1, values)
        expected += update / count
        configs = {Key.CIPHERTEXT_LIST: list(sealed[number].values()), Key.SOURCE_LIST: list(sealed[number])}
        down[number] += sum(map(len, sealed[number].values()))
        parameters = ndarrays_to_parameters([update])
        said = stage(number, mod._collect_masked_vectors, configs, int(WEIGHT), parameters)
        start = time.perf_counter()
        masked = [bytes_to_ndarray(one) for one in said[Key.MASKED_PARAMETERS]]
        total = masked if total is None else parameters_addition(total, masked)
        server.append(time.perf_counter() - start)
    shares: dict[int, list[bytes]] = {number: [] for number in numbers}
    for number in numbers:
        said = stage(number, mod._unmask, {Key.ACTIVE_NODE_ID_LIST: numbers, Key.DEAD_NODE_ID_LIST: []})
        for owner, share in zip(said[Key.NODE_ID_LIST], said[Key.SHARE_LIST], strict=True):
            shares[owner].append(share)
    start = time.perf_counter()
    total = parameters_mod(total, MODULUS)
    for owned in shares.values():
        mask = pseudo_rand_gen(combine_shares(owned), MODULUS, get_parameters_shape(total))
        total = parameters_subtraction(total, mask)
    factor, total = factor_extract(parameters_mod(total, MODULUS))
    (found,) = dequantize(total, CLIP, QUANTIZED)
    found = (found - (count - 1) * CLIP) * (QUANTIZED / factor)
    sent = ndarray_to_bytes(found.astype(np.float32))
    unmasking = (time.perf_counter() - start) / count
    start = time.perf_counter()
    received = bytes_to_ndarray(sent)
    return {
        "bytes_up": max(up.values()),
        "bytes_down": max(down.values()) + len(sent),
        "encrypt": list(seconds.values()),
        "server": [each + unmasking for each in server],
        "decrypt": [time.perf_counter() - start],
        "max_error": float(np.abs(received - expected).max()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--values", type=int, default=526_336)
    parser.add_argument("--clients", type=int, default=16)
    arguments = parser.parse_args()
    logging.disable(logging.CRITICAL)
    found = play(arguments.values, arguments.clients)
    print(json.dumps({**found, "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}))


if __name__ == "__main__":
    main()
