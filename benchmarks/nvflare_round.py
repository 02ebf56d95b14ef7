"""One encrypted FedAvg round of NVIDIA FLARE's own homomorphic path, measured: the rival row of ``wire.py``.

Runs in an environment of its own (``pip install "nvflare[HE]"``; checked with nvflare 2.9.0, tenseal 0.3.15) and
drives NVFlare's classes in the order in which a round runs them, without sockets: HEModelEncryptor and fobs at the
clients, HEInTimeAccumulateWeightedAggregator and HEModelShareableGenerator at the server, HEModelDecryptor at a
client. Clients and server are processes of their own, so that the peak memory is the server's. Prints one JSON line.

    python nvflare_round.py --values 526336 --clients 16
"""

from __future__ import annotations

import argparse
import json
import logging
import multiprocessing
import os
import resource
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import tenseal
from nvflare import __version__ as nvflare_version
from nvflare.apis.dxo import DXO, DataKind, MetaKey, from_shareable
from nvflare.apis.event_type import EventType
from nvflare.apis.fl_constant import FLContextKey, ReservedKey
from nvflare.apis.fl_context import FLContext
from nvflare.app_common.abstract.model import make_model_learnable
from nvflare.app_common.app_constant import AppConstants
from nvflare.app_opt.he.intime_accumulate_model_aggregator import HEInTimeAccumulateWeightedAggregator
from nvflare.app_opt.he.model_decryptor import HEModelDecryptor
from nvflare.app_opt.he.model_encryptor import HEModelEncryptor
from nvflare.app_opt.he.model_shareable_generator import HEModelShareableGenerator
from nvflare.fuel.sec.security_content_service import SecurityContentService
from nvflare.fuel.utils import fobs
from nvflare.lighter.impl.he import HEBuilder

ROUND = 0
STEPS = 10
"""Local steps that every client declares: equal weights, as in the other rows."""


def shapes(values: int) -> dict[str, tuple[int, ...]]:
    """The tensors of FACMIC's 512-wide adapter, or one of another size; each costs NVFlare a copy of its context."""
    adapter: dict[str, tuple[int, ...]] = {"fc1.weight": (512, 512), "fc1.bias": (512,), "norm.weight": (512,)}
    adapter |= {"norm.bias": (512,), "fc2.weight": (512, 512), "fc2.bias": (512,)}
    whole = sum(int(np.prod(shape)) for shape in adapter.values())
    return adapter if values == whole else {"update": (values,)}


def update_of(client: int, values: int) -> np.ndarray:
    """The same update as wire.py's site of that number."""
    return np.random.default_rng([7, client]).normal(0, 1e-3, values).clip(-0.01, 0.01)


def split(flat: np.ndarray) -> dict[str, np.ndarray]:
    parts, start = {}, 0
    for name, shape in shapes(flat.size).items():
        size = int(np.prod(shape))
        parts[name] = flat[start : start + size].reshape(shape).astype(np.float32)
        start += size
    return parts


def context(own: str, peer: str) -> FLContext:
    """An FLContext as a job runner would build it, without signature checks on the content."""
    made = FLContext()
    other = FLContext()
    for target, name in ((made, own), (other, peer)):
        target.set_prop(ReservedKey.IDENTITY_NAME, name, private=False, sticky=False)
    made.set_prop(FLContextKey.SECURE_MODE, False, private=True, sticky=False)
    made.set_prop(AppConstants.CURRENT_ROUND, ROUND, private=True, sticky=False)
    made.set_peer_context(other)
    return made


def clients(folder: Path, values: int, count: int) -> dict[str, Any]:
    """Provision, then encrypt and serialise every client's update."""
    builder = HEBuilder(poly_modulus_degree=8192, coeff_mod_bit_sizes=[60, 40, 40], scale_bits=40)  # its defaults
    builder.initialize(None, None)
    for name, is_client in (("client_context.tenseal", True), ("server_context.tenseal", False)):
        (folder / name).write_bytes(builder.get_serialized_context(is_client=is_client))
    SecurityContentService.initialize(content_folder=str(folder))
    seconds, size = [], 0
    for number in range(count):
        ctx = context(f"site-{number}", "server")
        encryptor = HEModelEncryptor(weigh_by_local_iter=True)
        encryptor.handle_event(EventType.START_RUN, ctx)
        dxo = DXO(DataKind.WEIGHT_DIFF, data=split(update_of(number, values)))
        dxo.set_meta_prop(MetaKey.NUM_STEPS_CURRENT_ROUND, STEPS)
        shareable = dxo.to_shareable()
        start = time.perf_counter()
        wire = fobs.dumps(encryptor.process(shareable, ctx))
        seconds.append(time.perf_counter() - start)
        size = len(wire)
        (folder / f"{number}.up").write_bytes(wire)
    return {"bytes_up": size, "encrypt": seconds}


def server(folder: Path, values: int, count: int) -> dict[str, Any]:
    """Load and add every client's update, and write the new global model."""
    SecurityContentService.initialize(content_folder=str(folder))
    ctx = context("server", "site-0")
    aggregator = HEInTimeAccumulateWeightedAggregator(
        expected_data_kind=DataKind.WEIGHT_DIFF, weigh_by_local_iter=False
    )
    generator = HEModelShareableGenerator()
    for component in (aggregator, generator):
        component.handle_event(EventType.START_RUN, ctx)
    seconds = []
    for number in range(count):
        path = folder / f"{number}.up"
        wire = path.read_bytes()
        path.unlink()
        start = time.perf_counter()
        received = fobs.loads(wire)
        received.set_peer_props({ReservedKey.IDENTITY_NAME: f"site-{number}"})
        received.add_cookie(AppConstants.CONTRIBUTION_ROUND, ROUND)
        if not aggregator.accept(received, ctx):
            raise RuntimeError(f"NVFlare's aggregator refused the update of site-{number}")
        seconds.append(time.perf_counter() - start)
        del wire, received
    aggregated = aggregator.aggregate(ctx)
    zeros = split(np.zeros(values))
    model = make_model_learnable(weights=zeros, meta_props={})
    ctx.set_prop(AppConstants.GLOBAL_MODEL, model, private=True, sticky=False)
    model = generator.shareable_to_learnable(aggregated, ctx)
    wire = fobs.dumps(generator.learnable_to_shareable(model, ctx))
    (folder / "down").write_bytes(wire)
    return {"bytes_down": len(wire), "server": seconds}


def receiver(folder: Path, values: int, count: int) -> dict[str, Any]:
    """Load and decrypt the new global model at one client."""
    SecurityContentService.initialize(content_folder=str(folder))
    wire = (folder / "down").read_bytes()
    ctx = context("site-0", "server")
    decryptor = HEModelDecryptor()
    decryptor.handle_event(EventType.START_RUN, ctx)
    start = time.perf_counter()
    data = from_shareable(decryptor.process(fobs.loads(wire), ctx)).data
    seconds = time.perf_counter() - start
    found = np.concatenate([np.asarray(data[name], np.float64).ravel() for name in shapes(values)])
    expected = sum(update_of(number, values) for number in range(count)) / count
    return {"decrypt": [seconds], "max_error": float(np.abs(found - expected).max())}


def _child(pipe: Any, role: Any, arguments: tuple[Any, ...]) -> None:
    # TenSEAL writes warnings to stdout, which is for the result.
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    logging.disable(logging.CRITICAL)
    result = role(*arguments)
    pipe.send((result, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024))


def in_process(role: Any, *arguments: Any) -> tuple[dict[str, Any], int]:
    """Run a role in a process of its own; its result and peak resident memory."""
    fork = multiprocessing.get_context("fork")
    here, there = fork.Pipe()
    process = fork.Process(target=_child, args=(there, role, arguments))
    process.start()
    there.close()
    try:
        result, peak = here.recv()
    except EOFError:
        raise SystemExit(f"nvflare_round: {role.__name__} ended without a result; see above") from None
    process.join()
    return result, peak


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--values", type=int, default=526_336)
    parser.add_argument("--clients", type=int, default=16)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sent, _ = in_process(clients, folder, arguments.values, arguments.clients)
        served, peak = in_process(server, folder, arguments.values, arguments.clients)
        received, _ = in_process(receiver, folder, arguments.values, arguments.clients)
    versions = {"nvflare": nvflare_version, "tenseal": tenseal.__version__}
    print(json.dumps({**sent, **served, **received, "peak_rss_bytes": peak, "versions": versions}))


if __name__ == "__main__":
    main()
