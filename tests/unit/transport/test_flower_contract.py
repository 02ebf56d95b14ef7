"""What we use of flwr beyond its public API: in two files, and each symbol as it was in the pinned version."""

from __future__ import annotations

import ast
import importlib
import importlib.metadata
import inspect
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
PRIVATE = {"server/flower_link.py", "clients/flower_node.py"}
PUBLIC = {"flwr.app", "flwr.clientapp", "flwr.serverapp"}


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


SYMBOLS = [(path, *symbol) for path in sorted(PRIVATE) for symbol in sorted(_private(Path(path)))]


@pytest.mark.parametrize(("path", "module", "name"), SYMBOLS)
def test_the_symbol_is_there(path: str, module: str, name: str) -> None:
    try:
        found = importlib.import_module(module)
    except ImportError:
        pytest.fail(f"{path} uses {module}, which flwr {importlib.metadata.version('flwr')} does not have")
    if not hasattr(found, name):
        pytest.fail(f"{path} uses {name} of {module}, which flwr {importlib.metadata.version('flwr')} does not have")


SIGNATURES = {
    ("flwr.superlink.main", "create_app"): ("config", "superlink_lifespan_class"),
    ("flwr.superlink.config_loader", "SuperLinkLifespanConfig"): (
        "control_address",
        "health_server_address",
        "host",
        "port",
        "insecure",
        "certificates",
        "superexec_auth_secret",
        "authn_plugin",
        "event_log_plugin",
        "fleet_event_log_plugin",
        "enable_event_log",
        "artifact_provider",
        "enable_supernode_auth",
        "fleet_api_type",
        "fleet_api_address",
        "simulation",
        "ssl_ca_certfile",
        "ssl_certfile",
        "ssl_keyfile",
        "database",
        "isolation",
        "runtime_dependency_install",
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
    ("flwr.supernode.node_auth_http_interceptor", "NodeAuthHttpInterceptor"): ("private_key", "public_key"),
    ("flwr.supercore.inflatable.inflatable_utils", "push_objects"): (
        "objects",
        "push_object_fn",
        "object_ids_to_push",
        "keep_objects",
        "max_concurrent_pushes",
    ),
    ("flwr.supercore.heartbeat", "HeartbeatSender"): ("heartbeat_fn",),
    ("flwr.supercore.fab", "Fab"): ("hash_str", "content", "verifications"),
}


@pytest.mark.parametrize(("symbol", "expected"), SIGNATURES.items(), ids=[".".join(symbol) for symbol in SIGNATURES])
def test_the_call_is_as_it_was(symbol: tuple[str, str], expected: tuple[str, ...] | None) -> None:
    module, path = symbol
    found = importlib.import_module(module)
    for name in path.split("."):
        assert hasattr(found, name), f"{module}.{path}: flwr has no {name} there"
        found = getattr(found, name)
    if expected is not None:
        assert tuple(inspect.signature(found).parameters) == expected, f"{module}.{path} takes other arguments"


def test_nobody_else_uses_what_is_not_public() -> None:
    for path in ROOT.rglob("*.py"):
        relative = path.relative_to(ROOT)
        if relative.parts[0] in ("secure_fed", "privacy", "clients", "server", "configs", "benchmarks"):
            others = {module for module, _ in _imports(path)} - PUBLIC
            assert relative.as_posix() in PRIVATE or not others, (relative, others)


def test_flwr_is_pinned_exactly() -> None:
    with (ROOT / "pyproject.toml").open("rb") as stream:
        project = tomllib.load(stream)["project"]
    (pin,) = [entry for entry in project["dependencies"] if entry.startswith("flwr")]
    assert pin == f"flwr=={importlib.metadata.version('flwr')}"
