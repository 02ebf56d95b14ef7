"""What we use of flwr beyond its public API: in four files, and each symbol as it was in the pinned version.

A failure names the functions of ours that stop working, as they stand in these files now.
"""

from __future__ import annotations

import ast
import importlib
import importlib.metadata
import importlib.util
import inspect
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
PRIVATE = {
    "server/flower_api.py",
    "server/flower_link.py",
    "clients/flower_node.py",
    "secure_fed/transport/flower_parcels.py",
}
PUBLIC = {"flwr.app", "flwr.clientapp", "flwr.serverapp"}
RIVAL = "benchmarks/secagg_round.py"
"""Measures Flower's own secure aggregation beside ours; nothing stands on it."""


def _imports(path: Path) -> set[tuple[str, str]]:
    """All ``from flwr... import symbol`` and ``import flwr...`` of a file."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "flwr":
            found |= {(str(node.module), alias.name) for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {(alias.name, "") for alias in node.names if alias.name.split(".")[0] == "flwr"}
    return found


def _private(path: Path) -> set[tuple[str, str]]:
    return {(module, name) for module, name in _imports(ROOT / path) if module not in PUBLIC}


def _uses(path: str) -> dict[str, set[str]]:
    """By name: the functions and classes of a file that read it, call it, build on it or override it."""
    found: dict[str, set[str]] = {}

    def visit(node: ast.AST, inside: tuple[str, ...]) -> None:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            inside = (*inside, node.name)
        name = {ast.Name: "id", ast.Attribute: "attr", ast.FunctionDef: "name"}.get(type(node))
        if name is not None:
            found.setdefault(getattr(node, name), set()).add(".".join(inside) or "the module")
        for child in ast.iter_child_nodes(node):
            visit(child, inside)

    visit(ast.parse((ROOT / path).read_text(encoding="utf-8")), ())
    return found


USES = {path: _uses(path) for path in sorted(PRIVATE)}
VERSION = importlib.metadata.version("flwr")


def _without(name: str) -> str:
    """What of ours stops working without a name, or with another meaning of it."""
    places = [f"{path}: {', '.join(sorted(uses[name]))}" for path, uses in USES.items() if name in uses]
    return f"these stop working: {'; '.join(places)}" if places else "nothing uses it: take it out here"


SYMBOLS = [(path, *symbol) for path in sorted(PRIVATE) for symbol in sorted(_private(Path(path)))]


@pytest.mark.parametrize(("path", "module", "name"), SYMBOLS)
def test_the_symbol_is_there(path: str, module: str, name: str) -> None:
    try:
        found = importlib.import_module(module)
    except ImportError:
        pytest.fail(f"flwr {VERSION} has no {module}, of which {path} takes {name}; {_without(name)}")
    there = hasattr(found, name) or importlib.util.find_spec(f"{module}.{name}") is not None
    assert there, f"flwr {VERSION} has no {module}.{name}; {_without(name)}"


SIGNATURES = {
    ("flwr.superlink.config_loader", "get_federation_manager"): ("is_simulation",),
    ("flwr.supercore.object_store", "ObjectStoreFactory"): ("database",),
    ("flwr.superlink.servicer.fleet.fleet_handlers", "pull_messages"): ("request", "state", "store"),
    ("flwr.superlink.servicer.fleet.fleet_handlers", "push_messages"): ("request", "state"),
    ("flwr.server.superlink.linkstate", "LinkState.store_object"): (
        "self",
        "run_id",
        "session_id",
        "object_id",
        "object_content",
    ),
    ("flwr.superlink.servicer.runtime.runtime_handlers", "push_messages"): ("request", "state", "task"),
    ("flwr.superlink.servicer.runtime.runtime_handlers", "pull_messages"): ("request", "state", "task"),
    ("flwr.server.superlink.linkstate", "InMemoryLinkState.store_message_ins"): ("self", "message"),
    ("flwr.server.superlink.linkstate", "InMemoryLinkState.get_message_ins"): ("self", "node_id", "limit", "run_id"),
    ("flwr.server.superlink.linkstate", "InMemoryLinkState.activate_node"): ("self", "node_id", "heartbeat_interval"),
    ("flwr.server.superlink.linkstate", "LinkState.acknowledge_node_heartbeat"): (
        "self",
        "node_id",
        "heartbeat_interval",
    ),
    ("flwr.server.superlink.linkstate", "LinkState.create_node"): (
        "self",
        "owner_aid",
        "owner_name",
        "public_key",
        "heartbeat_interval",
        "location",
        "name",
    ),
    ("flwr.server.superlink.linkstate", "LinkState.create_run"): (
        "self",
        "fab_id",
        "fab_version",
        "fab_hash",
        "override_config",
        "federation_id",
        "federation_config",
        "flwr_aid",
        "primary_task_type",
        "series_id",
        "series_description",
        "connector_ids",
        "initial_task_event",
        "user_prompt",
    ),
    ("flwr.server.superlink.linkstate", "LinkState.get_node_id_by_public_key"): ("self", "public_key"),
    ("flwr.server.superlink.linkstate", "LinkState.stop_run"): ("self", "run_id"),
    ("flwr.server.superlink.linkstate", "LinkState.claim_task"): ("self", "task_id"),
    ("flwr.server.superlink.linkstate", "LinkState.store_fab"): ("self", "fab"),
    ("flwr.server.superlink.linkstate", "InMemoryLinkState"): ("federation_manager", "object_store"),
    ("flwr.server.superlink.linkstate", "InMemoryLinkState.get_message_res"): ("self", "message_ids", "run_id"),
    ("flwr.server.superlink.linkstate", "InMemoryLinkState._check_stored_messages"): ("self", "message_ids", "run_id"),
    ("flwr.server.superlink.linkstate", "LinkState.get_run_info"): (
        "self",
        "run_ids",
        "statuses",
        "flwr_aids",
        "federation_ids",
        "order_by",
        "ascending",
        "limit",
        "skip",
    ),
    ("flwr.superlink.grid", "HttpGrid"): ("runtime_api_address", "insecure", "root_certificates", "token"),
    ("flwr.superlink.grid", "HttpGrid.set_run"): ("self", "run"),
    ("flwr.superlink.grid", "HttpGrid._runtime_client"): None,
    ("flwr.supernode.fleet_http_client", "FleetHttpClient.from_server_address"): (
        "server_address",
        "insecure",
        "root_certificates",
        "interceptors",
        "retry_invoker",
    ),
    ("flwr.superlink.grid", "HttpGrid._try_push_messages"): ("self", "run_id", "messages"),
    ("flwr.superlink.grid", "HttpGrid.pull_messages"): ("self", "message_ids"),
    ("flwr.supernode.fleet_http_client", "FleetHttpClient._unary_unary"): (
        "self",
        "path",
        "rpc_method",
        "request",
        "response_type",
        "timeout",
    ),
    ("flwr.supercore.inflatable.inflatable_utils", "inflate_object_from_contents"): (
        "object_id",
        "object_contents",
        "keep_object_contents",
        "objects",
    ),
    ("flwr.supercore.inflatable.inflatable_utils", "validate_object_content"): ("content",),
    ("flwr.supercore.heartbeat", "HeartbeatSender"): ("heartbeat_fn",),
    ("flwr.supercore.fab", "Fab"): ("hash_str", "content", "verifications"),
}


@pytest.mark.parametrize(("symbol", "expected"), SIGNATURES.items(), ids=[".".join(symbol) for symbol in SIGNATURES])
def test_the_call_is_as_it_was(symbol: tuple[str, str], expected: tuple[str, ...] | None) -> None:
    module, path = symbol
    found = importlib.import_module(module)
    last = path.split(".")[-1]
    assert any(last in uses for uses in USES.values()), _without(last)
    for name in path.split("."):
        assert hasattr(found, name), f"flwr {VERSION} has no {module}.{path}; {_without(last)}"
        found = getattr(found, name)
    if expected is not None:
        taken = tuple(inspect.signature(found).parameters)
        assert taken == expected, f"flwr {VERSION}: {module}.{path} takes other arguments; {_without(last)}"


STATE_ATTRIBUTES = ("lock", "message_ins_id_to_message_res_id", "message_ins_store", "nodes", "object_store")
"""Of ``InMemoryLinkState``, read by our state that builds on it."""


@pytest.mark.parametrize("name", STATE_ATTRIBUTES)
def test_the_state_has_the_attribute(name: str) -> None:
    kinds = importlib.import_module("flwr.server.superlink.linkstate").InMemoryLinkState.__mro__
    made = any(hasattr(kind, name) or f"self.{name}" in inspect.getsource(kind) for kind in kinds if kind is not object)
    assert made, f"flwr {VERSION}: InMemoryLinkState makes no {name}; {_without(name)}"


def test_the_message_names_what_stops_working() -> None:
    assert _without("get_message_res") == ("these stop working: server/flower_api.py: State.get_message_res")
    assert "server/flower_link.py: SuperLink._node" in _without("create_node")
    assert "clients/flower_node.py: " in _without("FleetHttpClient")
    assert _without("no_such_name") == "nothing uses it: take it out here"


def test_nobody_else_uses_what_is_not_public() -> None:
    for path in ROOT.rglob("*.py"):
        relative = path.relative_to(ROOT)
        if relative.parts[0] in ("secure_fed", "privacy", "clients", "server", "configs", "benchmarks"):
            others = {module for module, _ in _imports(path)} - PUBLIC
            assert relative.as_posix() in {*PRIVATE, RIVAL} or not others, (relative, others)


def test_flwr_is_pinned_exactly() -> None:
    with (ROOT / "pyproject.toml").open("rb") as stream:
        project = tomllib.load(stream)["project"]
    (pin,) = [entry for entry in project["dependencies"] if entry.startswith("flwr")]
    assert pin == f"flwr=={VERSION}"
