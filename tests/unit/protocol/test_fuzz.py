"""Hostile bytes against every decoder: one typed error, never a crash, a hang, 64 MiB or an accepted forgery.

A short run by default; ``FUZZ_EXAMPLES=N`` sets the inputs for each decoder (``make fuzz``).
"""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import time
import tracemalloc

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from secure_fed.core.errors import SecfacmicError
from tests.fuzz.mutations import bombs, hostile
from tests.fuzz.targets import Target, targets

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "5"))
MOST_BYTES = 64 * 2**20
MOST_SECONDS = 5.0
TARGETS = targets()
ELSEWHERE = {
    *("acknowledgement", "signed record header", "signed envelope header", "signed amendment header"),
    "journal folder",
}
"""Their corpus is of several places, of which one at most is due."""


def feed(target: Target, data: bytes) -> None:
    """Give a decoder bytes and hold it to its contract."""
    start = time.process_time()
    refusal: SecfacmicError | None = None
    try:
        target.feed(data)
    except SecfacmicError as error:
        refusal = error
    assert time.process_time() - start < MOST_SECONDS
    if refusal is not None:
        assert isinstance(refusal, target.errors), f"{type(refusal).__name__}: {refusal}"
        assert len(str(refusal)) < 20_000
    elif target.genuine:
        assert data in target.corpus


@pytest.mark.parametrize("name", sorted(set(TARGETS) - ELSEWHERE))
def test_the_corpus_is_accepted(name: str) -> None:
    """Otherwise the fuzzer would only ever see the first check."""
    for data in TARGETS[name].corpus:
        TARGETS[name].feed(data)


@pytest.mark.parametrize("name", sorted(TARGETS))
@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck), database=None)
@given(data=st.data())
def test_hostile_bytes(name: str, data: st.DataObject) -> None:
    feed(TARGETS[name], data.draw(hostile(TARGETS[name].corpus)))


@pytest.mark.parametrize("name", sorted(TARGETS))
def test_bombs_stay_small(name: str) -> None:
    target = TARGETS[name]
    for data in bombs(target.corpus[0]):
        tracemalloc.start()
        try:
            feed(target, data)
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert peak < MOST_BYTES, f"{peak} bytes for {data[:40]!r}"


def resident() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    """In a process of its own: how much all decoders together take beyond what true bytes take."""
    for target in TARGETS.values():
        for data in target.corpus:
            feed(target, data)
    made = {name: bombs(target.corpus[0]) for name, target in TARGETS.items()}
    before = resident()
    for name, target in TARGETS.items():
        for data in made[name]:
            feed(target, data)
    print(resident() - before)


def test_native_parsers_take_no_more_than_64_mib() -> None:
    """Peak resident memory of a whole process, which sees what SEAL, zstd and age allocate."""
    result = subprocess.run(
        [
            sys.executable,
            "-P",
            "-c",
            "import sys; sys.path.insert(0, '.'); from tests.unit.protocol import test_fuzz; test_fuzz.main()",
        ],
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    assert int(result.stdout.split()[-1]) < MOST_BYTES
