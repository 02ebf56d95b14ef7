"""A small study with real images, real keys and a real (random) backbone, made once and copied for each test."""

from __future__ import annotations

import hashlib
import logging
import shutil
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from multiprocessing import forkserver
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import safetensors.numpy
import typer.main
import typer.testing
from PIL import Image

import secure_fed.clients.features
import secure_fed.operate.new_study
from secure_fed import configs
from secure_fed.cli import main
from secure_fed.clients.site import Site
from secure_fed.clients.sitefile import read_site_file
from secure_fed.core.layout import ServerState
from secure_fed.core.tomlfile import parse_table
from secure_fed.lab.simulation import accept_another_run, prepare, run_id, simulate
from secure_fed.model import backbone as loading
from secure_fed.model import backbone_store
from secure_fed.model.device import Device
from secure_fed.model.loaded_backbone import LoadedBackbone
from secure_fed.operate.new_study import SERVER
from secure_fed.privacy.keys import create_sealed_key, load_identity
from secure_fed.protocol import codec
from secure_fed.protocol.rounds import ReplyCode
from secure_fed.protocol.signing import load_signing_key
from secure_fed.protocol.study import AgreedStudy, Template, load_study
from secure_fed.protocol.study_tables import Backbone
from secure_fed.server.coordinator import Coordinator
from secure_fed.server.flower_link import SuperLink
from tests.forked import CONTEXT

CLASSES = ("dark", "light", "striped")
TRAINING = ("ash", "birch", "cedar")
OBSERVER = "dogwood"

# Typer makes all commands anew, 0.08 s, whenever one is called: here that is hundreds of times in a process.
typer.testing._get_command = typer.main.get_command = cache(typer.main.get_command)
_loaded: dict[object, LoadedBackbone] = {}


def load_again(backbone: Backbone, checkpoint: Path | None, device: Device = "cpu") -> LoadedBackbone:
    """As the true function, but what was loaded lately from a file of the same bytes is not loaded anew.

    Every site of every small study would take 0.1 s for it.
    """
    path = loading._path(backbone, checkpoint)
    if path is None or not path.is_file() or path.stat().st_size > 2**26:
        return loading.load_backbone(backbone, checkpoint, device)
    content = hashlib.sha256(path.read_bytes()).digest()
    key = (backbone.model_dump_json(), path.name, checkpoint is None, device, content)
    _loaded[key] = _loaded.pop(key, None) or loading.load_backbone(backbone, checkpoint, device)
    if len(_loaded) > 4:
        del _loaded[next(iter(_loaded))]
    return _loaded[key]


# Where a study is made, and where its sites encode their images; what else is done with a backbone loads it.
for _module in (secure_fed.operate.new_study, secure_fed.clients.features):
    _module.load_backbone = load_again  # type: ignore[attr-defined]

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as shells start what runs in the background
    signal.signal(signal.SIGINT, signal.default_int_handler)  # else no process that a test starts hears Ctrl-C


@pytest.fixture(autouse=True)
def own_logging() -> Iterator[None]:
    """A command run in this process sets logging up for a process of its own; no test sees another's."""
    loggers = [logging.getLogger(name) for name in (None, "secure_fed", "flwr")]
    kept = [(logger, logger.handlers[:], logger.level) for logger in loggers]
    hook = threading.excepthook
    yield
    logging.captureWarnings(False)
    threading.excepthook = hook
    for logger, handlers, level in kept:
        logger.handlers[:] = handlers
        logger.setLevel(level)


@contextmanager
def models_as_found() -> Iterator[None]:
    """Models that are registered within are unknown to open_clip afterwards; a fixture of a module needs it too.

    Those of open_clip itself and ours stay, whoever loaded the library first.
    """
    library = sys.modules.get("open_clip.factory")
    before = [] if library is None else list(library._MODEL_CONFIG_PATHS)
    yield
    library = sys.modules.get("open_clip.factory")
    if library is None:
        return
    lasting = [*before, Path(str(library.__file__)).parent / "model_configs", configs.MODELS]
    kept = [path for path in library._MODEL_CONFIG_PATHS if path in lasting]
    if kept != library._MODEL_CONFIG_PATHS:
        library._MODEL_CONFIG_PATHS[:] = kept
        library._MODEL_CONFIGS.clear()
        library._rescan_model_configs()


@pytest.fixture(autouse=True)
def own_models() -> Iterator[None]:
    """No test sees the models that another one registered in open_clip."""
    with models_as_found():
        yield


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A store of backbones of the test's own, which is empty, and no network."""

    def no_network(*_: Any) -> None:
        raise AssertionError("a connection was tried")

    monkeypatch.setattr(socket.socket, "connect", no_network)
    monkeypatch.setattr(socket, "getaddrinfo", no_network)
    monkeypatch.setenv(backbone_store.PLACE, str(tmp_path / "store"))
    return tmp_path / "store"


def template_table(**changes: Any) -> dict[str, Any]:
    """The small study as the table that its TOML file would give."""
    sites = [{"name": name} for name in TRAINING] + [{"name": OBSERVER, "role": "observer"}]
    table: dict[str, Any] = {
        "format": 1,
        "name": "small",
        "mode": "he",
        "seed": 3,
        "rounds": 3,
        "max_sites": 4,
        "min_sites": 3,
        "collusion": 0,  # studies with pads, the default, have tests of their own
        "key_maker": "ash",
        "classes": [{"name": name, "prompts": [f"a {name} image", f"a picture that is {name}"]} for name in CLASSES],
        "backbone": {"model": "random-small", "weights": "random", "seed": 1},
        "method": {"adapter": "facmic", "lmmd_weight": 1.0},
        "training": {"steps": 4, "learning_rate": 0.003, "batch_size": 8},
        "encoding": {"bits": 16, "lanes": 2, "value_bound": 0.1},
        "sites": sites,
        "simulation": {
            "kind": "simulated",
            "unit": "image",
            "shares": {"train": 0.5, "val": 0.2, "test": 0.2, "unlabelled": 0.1},
            "sites": [{"name": site["name"], "folder": site["name"]} for site in sites],
        },
    }
    return table | changes


def make_template(**changes: Any) -> Template:
    """The small study's template."""
    return parse_table(template_table(**changes), Template, ValueError, "template")  # type: ignore[type-var]


def make_images(root: Path, per_class: int = 10) -> None:
    """Folders of 32-pixel images whose classes differ at a glance."""
    rng = np.random.default_rng(0)
    for site in (*TRAINING, OBSERVER):
        for index, name in enumerate(CLASSES):
            (root / site / name).mkdir(parents=True)
            for number in range(per_class):
                picture = rng.normal(60 + 120 * (index == 1), 20, (32, 32))
                if index == 2:
                    picture[:, ::4] += 150
                Image.fromarray(picture.clip(0, 255).astype(np.uint8)).save(root / site / name / f"{number}.png")


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("images")
    make_images(root)
    return root


class Federation:
    """One prepared study in a folder: its sites and its coordinator, to be driven message by message."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.agreed: AgreedStudy = load_study(folder / "study.toml")

    @property
    def signing(self) -> Any:
        return load_signing_key(ServerState(self.folder / SERVER).key)

    def site(self, name: str) -> Site:
        """Open a site from its folder, as a new process would."""
        return Site(read_site_file(self.folder / "sites" / name / "site.toml"), self.agreed)

    def sites(self) -> list[Site]:
        return [self.site(member.name) for member in self.agreed.study.sites]

    def seal_key(self, epoch: int, previous: str = "0" * 64, **changes: Any) -> bytes:
        maker = self.agreed.study.key_maker
        identity = load_identity(self.folder / "sites" / maker / "identity", maker)
        return create_sealed_key(self.agreed, identity, epoch, previous, **changes)

    def begin(self, sites: list[Site], run: str | None = None) -> Coordinator:
        """Hand a new key to the sites and begin a run; its id follows from its number if none is given."""
        sealed = self.seal_key(sites[0].replica.keys.newest[0] + 1)
        (key,) = {site.replica.keys.accept(sealed).key for site in sites}
        return self.open_run(key, run)

    def open_run(self, key: str = "0" * 64, run: str | None = None) -> Coordinator:
        """Begin a run under a key, which all have accepted: a second one too."""
        accept_another_run(self.agreed, self.folder)
        folder = self.folder / SERVER
        number = 1 + sum(1 for _ in ServerState(folder).run_folders())
        return Coordinator.begin(self.agreed, folder, self.signing, key, run=run or run_id(self.agreed.study, number))

    def reopen(self) -> Coordinator:
        """The coordinator as a new process would find it."""
        return Coordinator(self.agreed, self.folder / "server", self.signing)


def exchange(coordinator: Coordinator, site: Site) -> Any:
    """One request and reply; one more where a void has taken the place of the site's last sum."""
    position = site.position
    reply = site.respond(coordinator.request(site.name, site.run, position))
    coordinator.receive(reply)
    return exchange(coordinator, site) if site.position < position and reply.code == ReplyCode.MORE else reply


def pass_step(coordinator: Coordinator, sites: list[Site]) -> Any:
    """Ask every site what the step asks, and take the step; the record, if one was appended."""
    for site in sites:
        exchange(coordinator, site)
    return coordinator.advance()


def send_envelopes(coordinator: Coordinator, sites: list[Site]) -> list[Any]:
    """Make these sites a cohort and bring in their envelopes; the replies that carried them."""
    pass_step(coordinator, sites)
    return [exchange(coordinator, site) for site in sites]


def corrupt(site: Site, **tensors: Any) -> None:
    """Put other values into what a site holds, as a broken memory would."""
    state = site.replica.state
    damaged = replace(state, tensors=state.tensors | tensors)
    site.replica.state = replace(damaged, digests={damaged.chain.head: (damaged.digest, damaged.chain.key)})


def damage_adapter(adapter: Path) -> None:
    """Another adapter, with the digest that belongs to it: what no checksum finds."""
    with safetensors.safe_open(str(adapter), "np") as file:
        metadata = dict(file.metadata())
    tensors = safetensors.numpy.load(adapter.read_bytes())
    name = sorted(tensors)[0]
    tensors[name] = tensors[name] + 1e-9
    true, false = metadata["digest"], codec.adapter_digest(tensors)
    metadata = {key: value.replace(true, false) for key, value in metadata.items()}
    adapter.write_bytes(safetensors.numpy.save(tensors, metadata))


def close_round(coordinator: Coordinator, sites: Iterable[Site], steps: int = 3) -> Any:
    """Append the record of a round for which sites are ready: the other steps, with those whom they ask."""
    for _ in range(steps):
        entry = coordinator.advance()
        if entry is not None:
            return entry
        for site in sites:
            if site.name in coordinator.asked:
                exchange(coordinator, site)
    raise AssertionError(f"step {coordinator.step}, in {coordinator.sites_in}, asked {sorted(coordinator.asked)}")


def run_round(coordinator: Coordinator, sites: list[Site]) -> None:
    """Bring all sites up and append the round's record."""
    assert any(pass_step(coordinator, sites) is not None for _ in range(3))


def prepare_sites(template: Template, parent: Path, images: Path) -> Path:
    """The folder, below ``parent``, of a prepared study whose sites have cached their features."""
    prepare(template, parent / "out", images)
    for site in Federation(parent / "out").sites():
        site.features()
    return parent / "out"


def copy_of(folder: Path, parent: Path) -> Federation:
    """A copy, below ``parent``, of what was prepared for many tests."""
    shutil.copytree(folder, parent / "out", symlinks=True)
    return Federation(parent / "out")


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory, images: Path) -> Path:
    """A prepared study whose sites have cached their features."""
    return prepare_sites(make_template(), tmp_path_factory.mktemp("prepared"), images)


@pytest.fixture
def federation(prepared: Path, tmp_path: Path) -> Federation:
    """A fresh copy of the prepared study."""
    return copy_of(prepared, tmp_path)


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory: pytest.TempPathFactory, images: Path) -> Path:
    """What ``simulate`` left of the small study; only to be read."""
    out = tmp_path_factory.mktemp("finished") / "out"
    simulate(make_template(), out, images)
    return out


def stop_at_once(link: SuperLink) -> None:
    """Stop a server that shares this process, whose connections nobody closes: it would wait a second for them."""
    for listener, _ in link._servers:
        listener.force_exit = True
    link.stop()


@pytest.fixture
def forked_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tasks of sweeps that this process hands to workers run in forked ones, which need not import torch anew."""
    forkserver.ensure_running()  # not from within the environment of a worker
    monkeypatch.setattr("secure_fed.lab.workers.multiprocessing", SimpleNamespace(get_context=lambda _: CONTEXT))


class Result(NamedTuple):
    """How a command ended."""

    returncode: int
    stdout: str
    stderr: str


Run = Callable[..., Result]


@pytest.fixture
def secfacmic(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run the command's own entry point here: importing torch anew for each would take minutes."""

    def run(*arguments: object, cwd: Path | None = None) -> Result:
        monkeypatch.setattr(sys, "argv", ["secfacmic", *map(str, arguments)])
        if cwd is not None:
            monkeypatch.chdir(cwd)
        capfd.readouterr()
        code = 0
        try:
            main()
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1
        return Result(code, *capfd.readouterr())

    return run
