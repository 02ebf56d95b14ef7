"""What one encrypted round costs on the wire and in time, ours beside others', in turns in one run.

    python benchmarks/wire.py --nvflare-python PYTHON --json wire.json
    python benchmarks/wire.py --memory             the server's peak memory, 256 sites against 4
    python benchmarks/wire.py --lanes 1000000000   how many of so many lanes come out wrong

Every role runs in a process of its own: the coordinator's (with our real Coordinator: signatures, spool, fsync and
journal), the sites', and a site that opens the record. Times are medians over all sites and turns, wall clock; every
row runs once a turn, so that what else the machine does falls on all rows alike. Ours counts all of a round that grows
with the update: at a site sealing and the check of its REVEAL, at the server envelopes, REVEALs and the record. Bytes
are those of one envelope and one REVEAL with header and signature, and of one record; with pads also of the shares
that a site deals and is handed, of its CHECKED and of all of them.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import platform
import resource
import secrets
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from rich.console import Console
from rich.table import Table

from secure_fed.core.errors import AggregateRefused, EnvelopeError, LanesError, ProtocolError
from secure_fed.core.tomlfile import parse_table
from secure_fed.protocol import codec
from secure_fed.protocol.envelope import MAGIC, MAX_HEADER, RoundPosition, seal_envelope
from secure_fed.protocol.initial_state import InitialState
from secure_fed.protocol.ledger_heads import NO_LEDGER
from secure_fed.protocol.packing import MIN_BITS, Binding, Sealed, lane_parameters, largest_bits, wire
from secure_fed.protocol.pads import PadPlace, SitePads, new_private, public_of
from secure_fed.protocol.records import Chain
from secure_fed.protocol.residues import pack_residues, unpack_residues
from secure_fed.protocol.round_frames import (
    ARRIVED_MAGIC,
    COHORT_MAGIC,
    CohortHeader,
    SignedWord,
    cohort_keys,
    max_header,
    sign_ready,
    sign_reveal,
)
from secure_fed.protocol.rounds import ReplyCode, RoundReply
from secure_fed.protocol.share_frames import Dealt, check_digest, deal, hand_out, open_handed, sign_checked, take_handed
from secure_fed.protocol.signing import SIGNATURE_BYTES, parse_header, public_hex, split_frame
from secure_fed.protocol.study import AgreedStudy, Study
from secure_fed.server.coordinator import Coordinator, Step

VALUES = 526_336
"""Values of FACMIC's 512-wide adapter with layer norm."""

BOUND = 0.01

Encoding = tuple[int | None, int | None]
Shape = tuple[int, Encoding, int, bool]
"""Sites, encoding and values of a round, and whether it has pads."""

REACH_SITES = 16
OURS: dict[str, Encoding] = {
    "ours-two-lanes": (None, 2),
    "ours-three-lanes": (None, 3),
    "ours-8-bits": (8, None),
    "ours-9-bits": (9, None),
    "ours-16-bits": (16, None),
}
"""Bits and lanes: without bits the most that the lanes hold, without lanes those of the fewest bytes."""
PADS = "ours-9-bits-pads"
PADDED: dict[int, Encoding] = {64: (16, None), 256: (12, None)}
"""Encoding of the row with pads where 9 bits would be of fewer bytes than anybody needs."""
ROWS = (*OURS, PADS, "tenseal-8192", "nvflare", "flower-secagg", "float32")
MOST_SECAGG = 64
"""Sites above which Flower's is not run: it would take hours."""
SECONDS = ("encrypt_s", "server_s_per_site", "decrypt_s")
MOST_MEMORY = 1.2

console = Console(stderr=True)
out = Console(width=170)


@dataclass
class Samples:
    """What one row at one number of sites has given so far."""

    bytes_up: int = 0
    bytes_down: int = 0
    seconds: dict[str, list[float]] = field(default_factory=lambda: {name: [] for name in SECONDS})
    peak_rss_bytes: list[int] = field(default_factory=list)
    max_error: float = 0.0
    wrong_integers: int | None = None
    refused: str | None = None

    def add(self, result: dict[str, Any]) -> None:
        """Take one turn's figures."""
        self.bytes_up, self.bytes_down = result["bytes_up"], result["bytes_down"]
        for name, key in zip(SECONDS, ("encrypt", "server", "decrypt"), strict=True):
            self.seconds[name] += result[key]
        self.peak_rss_bytes.append(result["peak_rss_bytes"])
        self.max_error = max(self.max_error, result["max_error"])
        if result.get("wrong_integers") is not None:
            self.wrong_integers = (self.wrong_integers or 0) + result["wrong_integers"]

    def row(self, name: str, sites: int, values: int) -> dict[str, Any]:
        """One row of the report."""
        measured = self.refused is None
        return {
            "name": name,
            "sites": sites,
            "values": values,
            "bytes_up": self.bytes_up if measured else None,
            "bytes_down": self.bytes_down if measured else None,
            **{key: statistics.median(self.seconds[key]) if measured else None for key in SECONDS},
            "peak_rss_bytes": max(self.peak_rss_bytes) if measured else None,
            "max_error": self.max_error if measured else None,
            "wrong_integers": self.wrong_integers,
            "refused": self.refused,
        }


def update_of(site: int, values: int) -> npt.NDArray[np.float64]:
    """A site's update; nvflare_round.py makes the same."""
    update: npt.NDArray[np.float64] = np.random.default_rng([7, site]).normal(0, 1e-3, values).clip(-BOUND, BOUND)
    return update


def _child(pipe: Any, role: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    # TenSEAL writes warnings to stdout.
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    pipe.send((role(*arguments), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024))


def in_process(role: Callable[..., Any], *arguments: Any) -> tuple[Any, int]:
    """Run a role in a process of its own; its result and peak resident memory.

    This process itself stays small (numpy and what the coordinator imports): a child's peak begins with it.
    """
    fork = multiprocessing.get_context("fork")
    here, there = fork.Pipe()
    process = fork.Process(target=_child, args=(there, role, arguments))
    process.start()
    there.close()
    try:
        result, peak = here.recv()
    except EOFError:
        raise SystemExit(f"wire: {role.__name__} ended without a result; see above") from None
    process.join()
    return result, int(peak)


# --- ours ---


def study_of(sites: int, encoding: Encoding, values: int, pads: bool, keys: Sequence[Ed25519PrivateKey]) -> AgreedStudy:
    """A study of so many sites.

    Raises:
        LanesError: it does not fit.
    """
    bits, lanes = encoding
    if bits is None:
        assert lanes is not None
        bits = max(MIN_BITS, largest_bits(sites, lanes))
    chosen = lane_parameters(sites, bits, lanes, values)
    table = {
        "format": 2,
        "name": "wire",
        "mode": "he",
        "seed": 1,
        "rounds": 1,
        "max_sites": sites,
        "min_sites": 3,
        "collusion": int(pads),
        "keep_rounds": 0,
        "key_maker": name_of(0),
        "classes": [{"name": name, "prompts": [name]} for name in ("a", "b")],
        "backbone": {"model": "none", "weights": "file", "file": "none", "digest": "0" * 64},
        "method": {"adapter": "facmic"},
        "training": {"steps": 1, "learning_rate": 0.1},
        "encoding": {"bits": bits, "lanes": chosen.lanes, "value_bound": BOUND, "share_validation": False},
        "sites": [
            {
                "name": name_of(index),
                "keys": {
                    "signing": public_hex(key),
                    # Nobody connects and nothing is sealed to them here: they must only be well-formed and distinct.
                    "flower": f"ecdsa-sha2-nistp256 {index:020d}",
                    "recipient": f"age1{index:058d}",
                },
            }
            for index, key in enumerate(keys[:-1])
        ],
        "coordinator": public_hex(keys[-1]),
        "initial": "0" * 64,
    }
    study = parse_table(table, Study, LanesError, "wire")
    return AgreedStudy(study, InitialState({"update": np.zeros(values)}, np.eye(2, dtype=np.float32), 100.0))


def name_of(index: int) -> str:
    """A site's name; they sort as their numbers do."""
    return f"site-{index:04d}"


def signing_keys(count: int) -> list[Ed25519PrivateKey]:
    """The sites' signing keys and the coordinator's, the last."""
    return [Ed25519PrivateKey.from_private_bytes(hashlib.sha256(b"%d" % index).digest()) for index in range(count + 1)]


def begin(folder: Path, shape: Shape) -> tuple[RoundPosition, str]:
    """Begin a run, for whose first round all sites are ready: where its envelopes belong, and the cohort's digest."""
    keys = signing_keys(shape[0])
    agreed = study_of(*shape, keys)
    coordinator = Coordinator.begin(agreed, folder / "server", keys[-1], "1" * 64)
    due = coordinator.journal.chain.due
    for index in range(shape[0]):
        fresh = None
        if agreed.study.pads:
            private = new_private()
            (folder / f"{index}.fresh").write_bytes(private)
            fresh = public_of(private)
        ready = sign_ready(agreed, due, coordinator.attempt, name_of(index), False, keys[index], fresh)
        coordinator.receive(reply_of(index, ReplyCode.READY, due.run, ready))
    coordinator.advance()
    question = asked_of(coordinator, 0)
    (folder / "cohort").write_bytes(question)
    return due, split_frame(COHORT_MAGIC, question, max_header(agreed), ProtocolError).digest


def asked_of(coordinator: Coordinator, index: int) -> bytes:
    """The question that a site is asked."""
    return coordinator.request(name_of(index), coordinator.run, 1).question


def reply_of(index: int, code: ReplyCode, run: str, word: bytes, carried: bytes = b"") -> RoundReply:
    """A site's reply that carries a signed word."""
    return RoundReply(name_of(index), code, run, 1, "", word, carried)


class Padding:
    """What sites do for pads in a round."""

    def __init__(self, folder: Path, agreed: AgreedStudy, due: RoundPosition, cohort: str) -> None:
        question = split_frame(COHORT_MAGIC, (folder / "cohort").read_bytes(), max_header(agreed), ProtocolError)
        keys = cohort_keys(parse_header(question.header, CohortHeader, ProtocolError))
        self.folder, self.agreed, self.due, self.cohort = folder, agreed, due, cohort
        self.names = list(keys)
        place = PadPlace(agreed.study.id, due, 1, cohort)
        privates = [(folder / f"{index}.fresh").read_bytes() for index in range(len(keys))]
        self.sites = [SitePads(place, keys, name, own) for name, own in zip(self.names, privates, strict=True)]
        self.needed = agreed.study.quorum(agreed.study.sites).needed
        self.dealt: list[Dealt] = []

    def put_on(self, index: int, sealed: Sealed) -> Sealed:
        """Pads, mask and shares of one site's envelope, and that it finds what is below them again."""
        lanes, mine, seed = self.agreed.lanes, self.sites[index], secrets.token_bytes(32)
        residues = unpack_residues(sealed.payload, lanes.modulus_bits)
        masked = mine.masked(residues, seed, lanes.modulus)
        assert np.array_equal(mine.unmasked(masked, seed, lanes.modulus), residues)
        self.dealt.append(deal(mine, seed, self.needed))
        (self.folder / f"{index}.seed").write_bytes(seed)
        return Sealed(sealed.contribution, pack_residues(masked, lanes.modulus_bits))

    def check(self, keys: Sequence[Ed25519PrivateKey]) -> dict[str, Any]:
        """Every site's CHECKED, once all have sent; none where nobody can be missed."""
        if not self.dealt[0].entries:
            return {"checked": [0.0] * len(self.names), "bytes_checked": 0, "bytes_handed": 0}
        frames = [(self.folder / f"{index}.up").read_bytes() for index in range(len(self.names))]
        parts = [split_frame(MAGIC, data, MAX_HEADER, EnvelopeError) for data in frames]
        words = tuple(SignedWord.of(part.header, part.signature) for part in parts)
        digest = check_digest(self.agreed, self.due, 1, self.cohort, words)
        roots = {name: dealt.hidden.shares for name, dealt in zip(self.names, self.dealt, strict=True)}
        handed = [hand_out(dealt.entries, dealt.hidden.shares, len(self.names) - 1) for dealt in self.dealt]
        seconds = []
        for index, name in enumerate(self.names):
            makers = [other for other in self.names if other != name]
            carried = b"".join(
                handed[maker][index - (maker < index)] for maker in range(len(self.names)) if maker != index
            )
            start = time.perf_counter()
            for maker, entry in take_handed(carried, self.names, makers, name, roots)[0].items():
                open_handed(self.sites[index], maker, entry)
            word = sign_checked(self.agreed, digest, name, [], keys[index])
            seconds.append(time.perf_counter() - start)
            (self.folder / f"{index}.checked").write_bytes(word)
        bytes_handed = len(carried) + SIGNATURE_BYTES * len(self.names)
        return {"checked": seconds, "bytes_checked": len(word), "bytes_handed": bytes_handed}


def make_secret(modulus_bits: int) -> bytes:
    """A study secret; it travels between processes by pipe, never by disk."""
    from secure_fed.privacy.ckks import StudySecret

    return StudySecret.generate(modulus_bits).to_bytes()


def send(folder: Path, shape: Shape, secret: bytes, due: RoundPosition, cohort: str) -> dict[str, Any]:
    """Every site's envelope as a file, and what the sum must be."""
    from secure_fed.privacy.ckks import Cipher, StudySecret

    sites, _, values, _ = shape
    keys = signing_keys(sites)
    agreed = study_of(*shape, keys)
    cipher = Cipher(agreed.lanes, StudySecret.from_bytes(secret))
    binding = Binding(run=due.run, head=due.head, round=due.round)
    padding = Padding(folder, agreed, due, cohort) if agreed.study.pads else None
    bounds = np.full(values, BOUND)
    total, mean = np.zeros(values, np.int64), np.zeros(values)
    seconds, size = [], 0
    for index in range(sites):
        update = update_of(index, values)
        draws = codec.rounding_draws(1, due.run, name_of(index), 1, values)
        integers = codec.quantise(update, bounds, 1.0, agreed.lanes.max_integer, draws).integers
        start = time.perf_counter()
        sealed = cipher.seal(integers, binding, name_of(index))
        hidden, entries = None, b""
        if padding is not None:
            sealed = padding.put_on(index, sealed)
            hidden, entries = padding.dealt[-1].hidden, padding.dealt[-1].entries
        data = seal_envelope(agreed, due, sealed, NO_LEDGER, keys[index], attempt=1, cohort=cohort, hidden=hidden)
        seconds.append(time.perf_counter() - start)
        size = len(data) + len(entries)
        (folder / f"{index}.shares").write_bytes(entries)
        (folder / f"{index}.up").write_bytes(data)
        total += integers
        mean += update / sites
    np.save(folder / "sum.npy", total)
    np.save(folder / "mean.npy", mean)
    checked = {} if padding is None else padding.check(keys)
    seconds = [mine + more for mine, more in zip(seconds, checked.get("checked", [0.0] * sites), strict=True)]
    size += checked.get("bytes_checked", 0)
    return {"bytes_up": size, "encrypt": seconds, "bytes_handed": checked.get("bytes_handed", 0)}


def serve(folder: Path, shape: Shape) -> dict[str, Any]:
    """Receive every envelope and fix their sum."""
    keys = signing_keys(shape[0])
    coordinator = Coordinator(study_of(*shape, keys), folder / "server", keys[-1])
    seconds = []
    for index in range(shape[0]):
        data = (folder / f"{index}.up").read_bytes()
        reply = reply_of(index, ReplyCode.UPDATE, coordinator.run, data, (folder / f"{index}.shares").read_bytes())
        start = time.perf_counter()
        coordinator.receive(reply)
        seconds.append(time.perf_counter() - start)
        del data, reply
    coordinator.advance()
    if coordinator.step is Step.CHECKED:
        for index in range(shape[0]):
            reply = reply_of(index, ReplyCode.CHECKED, coordinator.run, (folder / f"{index}.checked").read_bytes())
            start = time.perf_counter()
            coordinator.receive(reply)
            seconds[index] += time.perf_counter() - start
        coordinator.advance()
    assert not {"tenseal", "torch"} & set(sys.modules)
    (folder / "arrived").write_bytes(asked_of(coordinator, 0))
    return {"server": seconds}


def reveal(folder: Path, shape: Shape) -> dict[str, Any]:
    """Every site's REVEAL, from the payload that it sent."""
    keys = signing_keys(shape[0])
    agreed = study_of(*shape, keys)
    question = (folder / "arrived").read_bytes()
    arrived = split_frame(ARRIVED_MAGIC, question, max_header(agreed), ProtocolError).digest
    words = wire("he", agreed.lanes)
    seconds = []
    for index in range(shape[0]):
        payload = (folder / f"{index}.up").read_bytes()[-words.payload_bytes :]
        start = time.perf_counter()
        seed = (folder / f"{index}.seed").read_bytes().hex() if agreed.study.pads else None
        word = sign_reveal(agreed, arrived, name_of(index), words.check_words(arrived, payload), keys[index], seed)
        seconds.append(time.perf_counter() - start)
        (folder / f"{index}.reveal").write_bytes(word)
        (folder / f"{index}.up").unlink()
    return {"reveal": seconds, "bytes_reveal": len(word)}


def close(folder: Path, shape: Shape) -> dict[str, Any]:
    """Receive every REVEAL and append the record."""
    keys = signing_keys(shape[0])
    coordinator = Coordinator(study_of(*shape, keys), folder / "server", keys[-1])
    seconds = []
    for index in range(shape[0]):
        reply = reply_of(index, ReplyCode.REVEALED, coordinator.run, (folder / f"{index}.reveal").read_bytes())
        start = time.perf_counter()
        coordinator.receive(reply)
        seconds.append(time.perf_counter() - start)
    start = time.perf_counter()
    assert coordinator.advance() is not None
    append = (time.perf_counter() - start) / shape[0]
    return {"bytes_down": coordinator.journal.records[-1].size, "close": [each + append for each in seconds]}


def receive(folder: Path, shape: Shape, secret: bytes) -> dict[str, Any]:
    """Check and open the record at a site, the other sites' seeds included."""
    from secure_fed.privacy.ckks import Cipher, StudySecret

    agreed = study_of(*shape, signing_keys(shape[0]))
    (journal,) = (folder / "server/runs").glob("*/journal")
    chain = Chain(agreed)
    chain.advance(chain.check((journal / "00000000.record").read_bytes()))
    due = chain.due
    data = (journal / "00000001.record").read_bytes()
    cipher = Cipher(agreed.lanes, StudySecret.from_bytes(secret))
    start = time.perf_counter()
    record = chain.check(data)
    sums = cipher.open(record.ciphertexts(agreed), Binding(run=due.run, head=due.head, round=due.round), record.cohort)
    update = codec.average_update(sums, np.full(shape[2], BOUND), [1.0] * shape[0], agreed.lanes.max_integer)
    seconds = time.perf_counter() - start
    return {
        "decrypt": [seconds],
        "wrong_integers": int(np.count_nonzero(sums != np.load(folder / "sum.npy"))),
        "max_error": float(np.abs(update - np.load(folder / "mean.npy")).max()),
    }


def measure_ours(sites: int, values: int, encoding: Encoding, pads: bool = False) -> dict[str, Any]:
    """One round of ours."""
    shape = (sites, encoding, values, pads)
    agreed = study_of(*shape, signing_keys(sites))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        secret, _ = in_process(make_secret, agreed.lanes.modulus_bits)
        (due, cohort), _ = in_process(begin, folder, shape)
        sent, _ = in_process(send, folder, shape, secret, due, cohort)
        served, peak = in_process(serve, folder, shape)
        revealed, _ = in_process(reveal, folder, shape)
        closed, closing = in_process(close, folder, shape)
        received, _ = in_process(receive, folder, shape, secret)
    return {
        **received,
        "bytes_up": sent["bytes_up"] + revealed["bytes_reveal"],
        "bytes_down": closed["bytes_down"] + sent["bytes_handed"],
        "encrypt": [sum(parts) for parts in zip(sent["encrypt"], revealed["reveal"], strict=True)],
        "server": [sum(parts) for parts in zip(served["server"], closed["close"], strict=True)],
        "peak_rss_bytes": max(peak, closing),
    }


# --- others ---


def tenseal_send(folder: Path, values: int, sites: int) -> dict[str, Any]:
    import tenseal

    context = tenseal.context(tenseal.SCHEME_TYPE.CKKS, 8192, coeff_mod_bit_sizes=[60, 40, 40, 60])
    context.global_scale = 2**40
    public = context.copy()
    public.make_context_public()
    (folder / "public").write_bytes(public.serialize())
    seconds, size = [], 0
    for index in range(sites):
        update = update_of(index, values)
        start = time.perf_counter()
        data = tenseal.ckks_vector(context, update).serialize()
        seconds.append(time.perf_counter() - start)
        size = len(data)
        (folder / f"{index}.up").write_bytes(data)
    return {"bytes_up": size, "encrypt": seconds, "context": context.serialize(save_secret_key=True)}


def tenseal_serve(folder: Path, sites: int) -> dict[str, Any]:
    import tenseal

    context = tenseal.context_from((folder / "public").read_bytes())
    total: Any = None
    seconds = []
    for index in range(sites):
        data = (folder / f"{index}.up").read_bytes()
        (folder / f"{index}.up").unlink()
        start = time.perf_counter()
        vector = tenseal.ckks_vector_from(context, data)
        total = vector if total is None else total + vector
        seconds.append(time.perf_counter() - start)
    data = total.serialize()
    (folder / "down").write_bytes(data)
    return {"bytes_down": len(data), "server": seconds}


def tenseal_receive(folder: Path, values: int, sites: int, secret: bytes) -> dict[str, Any]:
    import tenseal

    context = tenseal.context_from(secret)
    data = (folder / "down").read_bytes()
    start = time.perf_counter()
    found = np.asarray(tenseal.ckks_vector_from(context, data).decrypt()) / sites
    seconds = time.perf_counter() - start
    expected = sum(update_of(index, values) for index in range(sites)) / sites
    return {"decrypt": [seconds], "max_error": float(np.abs(found - expected).max())}


def measure_tenseal(sites: int, values: int) -> dict[str, Any]:
    """One round of TenSEAL's own vector, as its tutorials use it."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sent, _ = in_process(tenseal_send, folder, values, sites)
        context = sent.pop("context")
        served, peak = in_process(tenseal_serve, folder, sites)
        received, _ = in_process(tenseal_receive, folder, values, sites, context)
    return {**sent, **served, **received, "peak_rss_bytes": peak}


def float32_round(values: int, sites: int) -> dict[str, Any]:
    encrypt, server = [], []
    total, expected = np.zeros(values, np.float32), np.zeros(values)
    for index in range(sites):
        update = update_of(index, values)
        start = time.perf_counter()
        data = update.astype("<f4").tobytes()
        encrypt.append(time.perf_counter() - start)
        start = time.perf_counter()
        total += np.frombuffer(data, "<f4")
        server.append(time.perf_counter() - start)
        expected += update / sites
    down = (total / np.float32(sites)).astype("<f4").tobytes()
    start = time.perf_counter()
    found = np.frombuffer(down, "<f4").astype(np.float64)
    decrypt = [time.perf_counter() - start]
    times = {"encrypt": encrypt, "server": server, "decrypt": decrypt}
    return {"bytes_up": len(data), "bytes_down": len(down), **times, "max_error": float(np.abs(found - expected).max())}


def measure_float32(sites: int, values: int) -> dict[str, Any]:
    """One round of plain numbers, without protection of any kind."""
    result, peak = in_process(float32_round, values, sites)
    return {**result, "peak_rss_bytes": peak}


def measure_script(name: str, sites: int, values: int, python: Path) -> dict[str, Any]:
    """One round of another system's, in a process and an environment of its own."""
    script = Path(__file__).with_name(name)
    command = [str(python), str(script), "--values", str(values), "--clients", str(sites)]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise SystemExit(f"wire: {' '.join(command)} ended with {result.returncode}:\n{result.stderr[-2000:]}")
    found: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return found


# --- the report ---


def measure(names: Sequence[str], sites: Sequence[int], values: int, turns: int, nvflare: Path | None) -> list[Any]:
    """All rows at all numbers of sites, in turns."""
    samples = {(name, count): Samples() for count in sites for name in names}
    for turn in range(turns):
        for (name, count), sample in samples.items():
            if sample.refused is not None:
                continue
            console.print(f"turn {turn + 1} of {turns}: {name}, {count} sites", highlight=False)
            try:
                if name in OURS:
                    sample.add(measure_ours(count, values, OURS[name]))
                elif name == PADS:
                    sample.add(measure_ours(count, values, PADDED.get(count, OURS["ours-9-bits"]), pads=True))
                elif name == "flower-secagg":
                    if count > MOST_SECAGG:
                        raise LanesError(f"not run above {MOST_SECAGG} sites")
                    sample.add(measure_script("secagg_round.py", count, values, Path(sys.executable)))
                elif name == "tenseal-8192":
                    sample.add(measure_tenseal(count, values))
                elif name == "nvflare":
                    assert nvflare is not None
                    sample.add(measure_script("nvflare_round.py", count, values, nvflare))
                else:
                    sample.add(measure_float32(count, values))
            except LanesError as error:
                sample.refused = str(error)
    return [sample.row(name, count, values) for (name, count), sample in samples.items()]


def ratio(rows: Sequence[dict[str, Any]], name: str, sites: int, key: str, base: str) -> float | None:
    """A row's figure against another row's."""
    found = {(row["name"], row["sites"]): row[key] for row in rows}
    mine, other = found.get((name, sites)), found.get((base, sites))
    return mine / other if mine is not None and other else None


def show(rows: Sequence[dict[str, Any]], sites: Sequence[int]) -> None:
    """The table, and the ratios that matter."""
    table = Table(title=f"one round, {rows[0]['values']:,} values")
    for column in ("sites", "row", "MB up", "MB down", "up / float32", "down / float32", "encrypt ms"):
        table.add_column(column, justify="left" if column == "row" else "right")
    for column in ("server ms a site", "decrypt ms", "server MB", "largest error", "wrong"):
        table.add_column(column, justify="right")
    for row in rows:
        cells = [str(row["sites"]), row["name"]]
        if row["refused"] is not None:
            table.add_row(*cells, f"refused: {row['refused']}")
            continue
        against = [ratio(rows, row["name"], row["sites"], key, "float32") for key in ("bytes_up", "bytes_down")]
        table.add_row(
            *cells,
            f"{row['bytes_up'] / 1e6:.3f}",
            f"{row['bytes_down'] / 1e6:.3f}",
            *("-" if value is None else f"{value:.3f}" for value in against),
            *(f"{1e3 * row[key]:.1f}" for key in SECONDS),
            f"{row['peak_rss_bytes'] / 1e6:.0f}",
            f"{row['max_error']:.1e}",
            "-" if row["wrong_integers"] is None else str(row["wrong_integers"]),
        )
    out.print(table)
    shown = REACH_SITES if REACH_SITES in sites else sites[0]
    for name in (*OURS, PADS):
        parts = [
            f"{label} {value:.3f} x {base}"
            for label, key, base in (
                ("up", "bytes_up", "float32"),
                ("down", "bytes_down", "float32"),
                ("encrypt + serialise", "encrypt_s", "nvflare"),
                ("server a site", "server_s_per_site", "nvflare"),
                ("decrypt", "decrypt_s", "nvflare"),
            )
            if (value := ratio(rows, name, shown, key, base)) is not None
        ]
        if parts:
            out.print(f"{name}, {shown} sites: {'; '.join(parts)}", highlight=False, soft_wrap=True)


def measure_memory(values: int, turns: int) -> list[dict[str, Any]]:
    """The coordinator's peak memory with 4 and with 256 sites."""
    rows = measure(["ours-two-lanes"], [4, 256], values, turns, None)
    few, many = (row["peak_rss_bytes"] for row in rows)
    out.print(
        f"coordinator's peak memory: {few / 1e6:.1f} MB with 4 sites, {many / 1e6:.1f} MB with 256: "
        f"{many / few:.3f} x, expected at most {MOST_MEMORY} x",
        highlight=False,
        soft_wrap=True,
    )
    return [*rows, superlink_row(rows[0])]


def superlink_row(like: dict[str, Any]) -> dict[str, Any]:
    """Peak memory of the process that carries the messages (Flower's SuperLink, state in memory: no database file)."""
    root = Path(__file__).parents[1]
    ended = subprocess.run(
        [sys.executable, str(root / "benchmarks" / "flower_round.py"), "--rounds", "4"],
        env=os.environ | {"PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        check=True,
    )
    found = json.loads(ended.stdout)
    peak = round(found["peak_memory_mb"]["server"] * 1e6)
    out.print(f"SuperLink's peak memory: {peak / 1e6:.1f} MB with {found['sites']} sites", highlight=False)
    return {**dict.fromkeys(like), "name": "superlink", "sites": found["sites"], "peak_rss_bytes": peak}


def count_wrong(wanted: int, values: int) -> dict[str, Any]:
    """Seal, sum and open until so many lanes were compared with the integers' own sum.

    Full cohorts at the most bits, where noise has least room. Of twice a cohort's envelopes every run of neighbours
    is one sum, so that each sealing serves several sums and no two sums are alike. Two to four lanes take turns, as
    do random integers and extreme ones.
    """
    from secure_fed.privacy.ckks import Cipher, StudySecret
    from secure_fed.protocol.packing import CipherWire

    result = {"lanes": 0, "sums": 0, "wrong": 0, "refused": 0}
    rng = np.random.default_rng()
    ciphers = []
    for sites, lanes in ((4, 2), (4, 3), (4, 4), (16, 2), (16, 3)):
        parameters = lane_parameters(sites, largest_bits(sites, lanes), lanes, values)
        secret = StudySecret.generate(parameters.modulus_bits)
        ciphers.append((parameters, Cipher(parameters, secret), CipherWire(parameters)))
    turn, told = 0, time.monotonic()
    while result["lanes"] < wanted:
        parameters, cipher, wire = ciphers[turn % len(ciphers)]
        most, count = parameters.max_integer, 2 * parameters.max_sites
        if turn // len(ciphers) % 2:
            integers = rng.choice(np.array([-most, most]), (count, values))
        else:
            integers = rng.integers(-most, most + 1, (count, values))
        binding = Binding(run=os.urandom(32).hex(), head="0" * 64, round=1)
        sealed = [cipher.seal(row, binding, name_of(index)) for index, row in enumerate(integers)]
        for first in range(count):
            chosen = [(first + step) % count for step in range(parameters.max_sites)]
            total = wire.zero()
            for index in chosen:
                total = wire.add(total, sealed[index].payload)
            payload = wire.record(total, len(chosen))
            try:
                sums = cipher.open(payload, binding, [sealed[index].contribution for index in chosen])
                result["wrong"] += int(np.count_nonzero(sums != integers[chosen].sum(axis=0)))
            except AggregateRefused:
                result["refused"] += 1
            result["lanes"] += values
            result["sums"] += 1
        turn += 1
        if time.monotonic() - told > 30:
            told = time.monotonic()
            console.print(f"{result}", highlight=False)
    return result


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--values", type=int, default=VALUES)
    parser.add_argument("--sites", type=_numbers, default=[4, 16, 64], help="numbers of sites, as 4,16,64")
    parser.add_argument("--turns", type=int, default=3, help="how often each row is run")
    parser.add_argument("--rows", default=",".join(ROWS), help="rows to run; default all")
    parser.add_argument("--nvflare-python", type=Path, metavar="PATH", help="Python of an environment with nvflare[HE]")
    parser.add_argument("--json", type=Path, metavar="F", help="write the rows there")
    parser.add_argument("--memory", action="store_true", help="only the coordinator's memory, 256 sites against 4")
    parser.add_argument("--lanes", type=int, metavar="N", help="only count wrong integers in N lanes")
    arguments = parser.parse_args()
    report: dict[str, Any] = {"machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} CPUs"}
    failed = False
    if arguments.lanes is not None:
        counted = count_wrong(arguments.lanes, arguments.values)
        report |= counted
        out.print(
            f"{counted['wrong']} wrong integers in {counted['lanes']:,} lanes of {counted['sums']} sums; "
            f"{counted['refused']} sums refused",
            highlight=False,
        )
        failed = bool(counted["wrong"] or counted["refused"])
    elif arguments.memory:
        report["rows"] = measure_memory(arguments.values, arguments.turns)
        few, many = (row["peak_rss_bytes"] for row in report["rows"][:2])
        failed = many > MOST_MEMORY * few
    else:
        names = [name for name in arguments.rows.split(",") if name != "nvflare" or arguments.nvflare_python]
        unknown = sorted(set(names) - set(ROWS))
        if unknown:
            parser.error(f"--rows: {', '.join(unknown)}; expected some of {', '.join(ROWS)}")
        report["rows"] = measure(names, arguments.sites, arguments.values, arguments.turns, arguments.nvflare_python)
        show(report["rows"], arguments.sites)
        failed = any(row["wrong_integers"] for row in report["rows"])
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(report, indent=2) + "\n")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
