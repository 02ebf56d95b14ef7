"""``deploy/``: units, image and compose file name commands that exist, and say what the documentation says."""

from __future__ import annotations

import configparser
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import typer
import yaml

from secure_fed.cli import app
from secure_fed.core.exit_codes import pages
from secure_fed.core.status import StatusFile
from secure_fed.operate.metrics import _StatusCollector

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
UNITS = ("secfacmic-server.service", "secfacmic-client.service")
EXECUTABLE = "/opt/secfacmic/bin/secfacmic"


def check_command(words: list[str]) -> None:
    """Every word of a command line after ``secfacmic``: its commands and options exist."""
    command = typer.main.get_command(app)
    while hasattr(command, "commands"):
        known = command.commands
        name = words[0] if words[0] in known or command.name != "evidence" else "pack"
        assert name in known, f"secfacmic has no command {words}"
        command = known[name]
        words = words[1:] if words[0] == name else words
    options = {option for parameter in command.params for option in parameter.opts}
    for word in words:
        if word.startswith("--"):
            assert word in options, f"{command.name} has no option {word}"
    required = {p.opts[0] for p in command.params if p.required and p.param_type_name == "option"}
    assert required <= set(words), f"{command.name} lacks {required - set(words)}"


def unit(name: str) -> configparser.ConfigParser:
    parser = configparser.ConfigParser(strict=False, interpolation=None)
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    parser.read(DEPLOY / name)
    return parser


@pytest.mark.parametrize("name", UNITS)
def test_units_run_commands_that_exist(name: str) -> None:
    service = unit(name)["Service"]
    words = shlex.split(service["ExecStart"])
    assert words[0] == EXECUTABLE
    check_command(words[1:])
    # SIGTERM is Ctrl-C: a stop is no failure, and the codes that start it again are those that the page names.
    assert service["SuccessExitStatus"] == "130"
    assert service["Restart"] == "on-abnormal"
    again = {int(code) for code in service["RestartForceExitStatus"].split()}
    assert again == {1, 60, 85, 86}
    text = (ROOT / "docs" / "exit-codes.md").read_text()
    assert "should start a process again after 1, 60 (a full disk may have been emptied), 85 and 86" in " ".join(
        text.split()
    )
    assert again <= set(pages())


@pytest.mark.parametrize("name", UNITS)
@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="no systemd here")
def test_systemd_finds_nothing_wrong_with_the_units(name: str, tmp_path: Path) -> None:
    text = (DEPLOY / name).read_text().replace(EXECUTABLE, sys.executable)
    (tmp_path / name).write_text(text)
    found = subprocess.run(
        ["systemd-analyze", "verify", str(tmp_path / name)], capture_output=True, text=True, timeout=60
    )
    complaints = [line for line in found.stderr.splitlines() if name in line]
    assert complaints == []
    # And it does look: a directive that does not exist is named.
    (tmp_path / name).write_text(text.replace("KillMode=mixed", "KillMoode=mixed"))
    found = subprocess.run(
        ["systemd-analyze", "verify", str(tmp_path / name)], capture_output=True, text=True, timeout=60
    )
    assert "KillMoode" in found.stderr


def test_compose_runs_commands_that_exist() -> None:
    content = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
    services = content["services"]
    assert set(services) == {"server", "site"}
    for service in services.values():
        check_command(service["command"])
        assert (DEPLOY / service["build"]["context"] / service["build"]["dockerfile"]).is_file()
        assert service["cap_drop"] == ["ALL"]
        assert service["read_only"] is True
    assert not services["site"].get("ports")  # nothing listens at a hospital
    assert any(volume.endswith(":/data:ro") for volume in services["site"]["volumes"])
    health = services["server"]["healthcheck"]["test"]
    assert health[:2] == ["CMD", "secfacmic"]
    check_command(health[2:])
    # The server listens where the page's step 5 does.
    page = (ROOT / "docs" / "deploy.md").read_text()
    assert "secfacmic " + shlex.join(services["server"]["command"]) in page


def test_compose_starts_a_refusal_again_a_few_times_and_a_normal_end_never() -> None:
    """Docker cannot tell a refusal that needs a person by its code, as the units do: so it gives up, and says so."""
    services = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]
    page = (ROOT / "docs" / "deploy.md").read_text()
    for name, service in services.items():
        found = re.fullmatch(r"on-failure:([1-9])", service["restart"])
        assert found, f"{name}: {service['restart']}"
        assert f"at most {['', 'one', 'two', 'three', 'four', 'five'][int(found[1])]} times" in page


def test_the_pages_installation_is_the_images_and_the_wheelhouses() -> None:
    """So that what the page says first is what is built from here, and tried without a network."""
    text = (ROOT / "docs" / "deploy.md").read_text()
    step = text[text.index("## Before: the program") : text.index("## 1. ")]
    image, makefile = (DEPLOY / "Dockerfile").read_text(), (ROOT / "Makefile").read_text()
    assert "pip install secfacmic" in step
    assert step.index("pip install --no-index --find-links wheelhouse secfacmic") < text.index("secfacmic site init")
    assert re.search(r"^wheelhouse:", makefile, re.MULTILINE)
    assert "make wheelhouse" in step
    for words in ("--requirement deploy/requirements-server.txt", "--no-deps"):
        assert words in step
        assert words in image


def test_alerts_are_on_figures_that_there_are(tmp_path: Path) -> None:
    status = StatusFile(tmp_path)
    status.begin("server")
    status.tell(sites={"ash": {"role": "train", "connected": True, "in": True}})
    shown = {sample.name for metric in _StatusCollector(status).collect() for sample in metric.samples}
    rules = yaml.safe_load((DEPLOY / "alerts.yml").read_text())["groups"][0]["rules"]
    assert len({rule["alert"] for rule in rules}) == len(rules) > 5
    for rule in rules:
        used = set(re.findall(r"secfacmic_\w+", rule["expr"]))
        assert used <= shown, used - shown
        assert used or "up{" in rule["expr"]


@pytest.mark.skipif(shutil.which("promtool") is None, reason="no promtool here")
def test_prometheus_takes_the_alerts() -> None:
    found = subprocess.run(["promtool", "check", "rules", str(DEPLOY / "alerts.yml")], capture_output=True, text=True)
    assert found.returncode == 0, found.stdout + found.stderr


def test_the_image_is_made_of_what_is_here() -> None:
    text = (DEPLOY / "Dockerfile").read_text()
    python = re.findall(r"^FROM python:(\d+)\.(\d+)", text, re.MULTILINE)
    assert set(python) == {python[0]}
    assert set(re.findall(r"--requirement (\S+)", text)) == {"deploy/requirements-server.txt"}
    targets = set(re.findall(r"^FROM .* AS (\S+)$", text, re.MULTILINE))
    services = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]
    assert {service["build"]["target"] for service in services.values()} == {"server", "site"} <= targets
    wanted = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["requires-python"]
    assert wanted == f">={python[0][0]}.{python[0][1]}"
    assert "USER secfacmic" in text  # not root
    assert 'ENTRYPOINT ["secfacmic"]' in text


def commands_of(page: Path) -> list[str]:
    blocks = re.findall(r"^```sh[^\n]*\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)
    return [line for block in blocks for line in block.splitlines() if line.strip()]


def test_the_page_has_only_commands_that_exist() -> None:
    lines = commands_of(ROOT / "docs" / "deploy.md")
    assert len(lines) >= 18
    for line in lines:
        words = shlex.split(line, comments=True)
        assert words[0] == "secfacmic", line
        check_command(words[1:])
    used = {line.split()[1] for line in lines}
    assert {"site", "study", "keys", "server", "client", "evidence", "doctor"} <= used


def test_the_page_sends_only_what_it_made_and_no_private_key() -> None:
    text = (ROOT / "docs" / "deploy.md").read_text()
    sends = re.findall(r"^```send\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    files = [line.split("->")[0].split(":", 1)[1].strip() for block in sends for line in block.splitlines()]
    public = {"$SITE.pub", "study.toml", "study.safetensors", "ca.crt"}
    assert {Path(file).name for file in files} == public | {"study.key"}  # public files and one sealed file
    assert text.index("study ca") < text.index("coordinator:fed/server/tls/ca.crt")
