"""``secfacmic ledger``: what a site has spent of its patients' privacy."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from secure_fed.cli.output import Json, out, print_json

if TYPE_CHECKING:
    from secure_fed.clients.sitefile import SiteFile

app = typer.Typer(help="What a site has spent of its patients' privacy.", no_args_is_help=True)

SiteDir = Annotated[Path, typer.Argument(metavar="SITE_DIR", help="The site's folder, with its site.toml.")]


@app.command()
def show(site: SiteDir, json_: Json = False) -> None:
    """Show every release, what it cost, and what is left."""
    facts = _facts(_site_file(site))
    if json_:
        print_json(facts)
        return
    if not facts["events"]:
        out.print(f"{facts['site']}: nothing was spent", highlight=False)
        return
    table = Table("seq", "block", "purpose", "sensitivity", "noise std", "steps", "mu squared", "state")
    for event in facts["events"]:
        table.add_row(
            str(event["seq"]),
            str(event["block"]),
            event["purpose"],
            f"{event['sensitivity']:g}",
            f"{event['noise_std']:.4g}",
            str(event["steps"]),
            f"{event['mu_squared']:.4g}",
            event["state"],
        )
    out.print(table)
    label = "simulated " if facts["simulated"] else ""
    for block, spent in facts["blocks"].items():
        out.print(f"block {block}: {label}epsilon {spent:.4f}", highlight=False)
    out.print(
        f"{facts['site']}: {label}epsilon {facts['epsilon_spent']:.4f} of {facts['epsilon_budget']:g} spent at delta "
        f"{facts['delta']:g}; unit: one {facts['unit']}",
        highlight=False,
        soft_wrap=True,
    )
    out.print(facts["claim"], highlight=False)


@app.command()
def verify(site: SiteDir, json_: Json = False) -> None:
    """Check chain, MACs and sums of a ledger."""
    facts = _facts(_site_file(site))
    if json_:
        print_json({"verified": True, **{name: facts[name] for name in ("head", "epsilon_spent", "epsilon_budget")}})
        return
    out.print(
        f"{facts['site']}: the ledger verifies; {len(facts['events'])} releases, head {facts['head']['seq']} "
        f"{facts['head']['id']}",
        highlight=False,
        soft_wrap=True,
    )


@app.command()
def export(
    site: SiteDir,
    into: Annotated[Path, typer.Option("--out", help="The export; holds the ledger's key, so keep it as safe.")],
) -> None:
    """Write the ledger, its blocks and its key as one file, from which it can be restored."""
    from secure_fed.clients.private_round import ledger_folder
    from secure_fed.core.storage import write_durable
    from secure_fed.privacy.ledger import opened
    from secure_fed.protocol.signing import PRIVATE

    with opened(_existing(ledger_folder(_site_file(site)))) as ledger:
        write_durable(into, ledger.export(), PRIVATE)
        seq = ledger.head[0]
    out.print(f"{into}: the ledger up to entry {seq}; keep it as safe as a key", highlight=False, soft_wrap=True)


@app.command()
def restore(
    site: SiteDir, exported: Annotated[Path, typer.Argument(metavar="EXPORT", help="A file made by ledger export.")]
) -> None:
    """Put an export in place of a lost or damaged ledger; it opens when the study's journal confirms its head."""
    from secure_fed.clients.private_round import ledger_folder
    from secure_fed.core.errors import LedgerError
    from secure_fed.privacy.ledger import restore as put_back

    try:
        data = exported.read_bytes()
    except OSError as error:
        raise LedgerError(f"{exported}: cannot be read ({error.strerror}); expected a ledger's export") from error
    ledger = put_back(ledger_folder(_site_file(site)), data)
    out.print(
        f"restored up to entry {ledger.head[0]}; nothing is spent until the journal shows that server and sites hold "
        "no later one",
        highlight=False,
        soft_wrap=True,
    )


def _site_file(folder: Path) -> SiteFile:
    from secure_fed.clients.sitefile import read_site_file

    return read_site_file(folder / "site.toml")


def _existing(folder: Path) -> Path:
    from secure_fed.core.errors import LedgerError
    from secure_fed.privacy.ledger import Ledger

    if not Ledger.exists(folder):
        raise LedgerError(f"{folder}: no ledger; expected one: this site has spent nothing, or its state is elsewhere")
    return folder


def _facts(file: SiteFile) -> dict[str, Any]:
    """The ledger as a document; that of a site that never spent is empty."""
    from secure_fed.clients.private_round import ledger_folder
    from secure_fed.privacy.ledger import Ledger

    folder = ledger_folder(file)
    if Ledger.exists(folder):
        return Ledger(folder).summary()
    budget = file.privacy
    return {
        "site": file.site,
        "data": file.data.kind,
        "simulated": file.data.kind != "patients",
        "epsilon_spent": 0.0,
        "epsilon_budget": None if budget is None else budget.epsilon,
        "delta": None if budget is None else budget.delta,
        "unit": file.data.unit,
        "claim": "",
        "blocks": {},
        "head": {"seq": 0, "id": "0" * 64},
        "events": [],
    }
