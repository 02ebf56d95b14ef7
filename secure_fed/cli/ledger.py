"""``secfacmic ledger``: what a site has spent of its patients' privacy."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from secure_fed.cli.output import SITE_HELP, Json, out, print_json

if TYPE_CHECKING:
    from secure_fed.clients.sitefile import SiteFile

app = typer.Typer(help="What a site has spent of its patients' privacy.", no_args_is_help=True)

SitePath = Annotated[Path, typer.Argument(metavar="SITE", help=SITE_HELP)]

SiteFileOption = Annotated[Path, typer.Option("--site", help=SITE_HELP)]
PatientId = Annotated[str, typer.Argument(help="A patient's id, or # and the digits that the start of the site told.")]


@app.command()
def show(site: SitePath, json_: Json = False) -> None:
    """Show every release, what it cost, and what is left."""
    from secure_fed.operate.ledger_copies import ledger_facts

    facts = ledger_facts(_site_file(site))
    if json_:
        print_json(facts)
        return
    if not facts["events"]:
        out.print(f"{facts['site']}: nothing was spent", highlight=False)
        return
    table = Table("seq", "block", "purpose", "sensitivity", "noise std", "steps", "mu squared", "state")
    for event in facts["events"]:
        if "seq" not in event:
            table.add_row("", str(event["block"]), event["purpose"], "", "", "", f"{event['mu_squared']:.4g}", "sent")
            continue
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
    out.print("local, for this site's own eyes: who is in which block depends on single patients", highlight=False)
    for block, spent in facts["blocks"].items():
        out.print(
            f"block {block}, {facts['members'][block]} {facts['unit']}s: {label}epsilon {spent:.4f}", highlight=False
        )
    out.print(
        f"{facts['site']}: {label}epsilon {facts['epsilon_spent']:.4f} of {facts['epsilon_budget']:g} spent at delta "
        f"{facts['delta']:g}; unit: one {facts['unit']}",
        highlight=False,
        soft_wrap=True,
    )
    out.print(facts["claim"], highlight=False)


@app.command()
def verify(site: SitePath, json_: Json = False) -> None:
    """Check chain, MACs and sums of a ledger."""
    from secure_fed.operate.ledger_copies import verify_ledger

    facts = verify_ledger(_site_file(site))
    if json_:
        print_json({"verified": True, **{name: facts[name] for name in ("head", "epsilon_spent", "epsilon_budget")}})
        return
    out.print(
        f"{facts['site']}: the ledger verifies; {len(facts['releases'])} releases, head {facts['head']['seq']} "
        f"{facts['head']['id']}",
        highlight=False,
        soft_wrap=True,
    )


@app.command()
def export(
    site: SitePath,
    into: Annotated[Path, typer.Option("--out", help="The export; holds the ledger's key, so keep it as safe.")],
) -> None:
    """Write the ledger, its blocks and its key as one file, from which it can be restored."""
    from secure_fed.operate.ledger_copies import export_ledger

    seq = export_ledger(_site_file(site), into)
    out.print(f"{into}: the ledger up to entry {seq}; keep it as safe as a key", highlight=False, soft_wrap=True)


@app.command()
def restore(
    site: SitePath, exported: Annotated[Path, typer.Argument(metavar="EXPORT", help="A file made by ledger export.")]
) -> None:
    """Put an export in place of a lost or damaged ledger; it opens when the study's journal confirms its head."""
    from secure_fed.operate.ledger_copies import restore_ledger

    seq = restore_ledger(_site_file(site), exported)
    out.print(
        f"restored up to entry {seq}; nothing is spent until the journal shows that server and sites hold no later one",
        highlight=False,
        soft_wrap=True,
    )


@app.command()
def adopt(
    states: Annotated[list[Path], typer.Argument(metavar="STATE...", help="State folders of this identity, of 0.1.")],
    site: SiteFileOption,
) -> None:
    """Take over the ledgers that version 0.1 left in state folders; histories add for each patient."""
    from secure_fed.clients.sitefile import read_site_file
    from secure_fed.operate.ledger_copies import adopt_ledger

    file = read_site_file(site)
    for state in states:
        adopt_ledger(file, state)
        out.print(f"{state}: its ledger is adopted; start no older version there", highlight=False, soft_wrap=True)


@app.command()
def link(first: PatientId, second: PatientId, site: SiteFileOption) -> None:
    """Say that two patient ids are one patient: what was spent on both adds up."""
    from secure_fed.clients.sitefile import read_site_file
    from secure_fed.operate.ledger_copies import link_patients

    spent, budget = link_patients(read_site_file(site), first, second)
    said = "" if spent <= budget else ": above the budget, so that the patient takes part in nothing any more"
    out.print(
        f"local: one patient, who has spent epsilon {spent:.4f} of {budget:g}{said}", highlight=False, soft_wrap=True
    )


@app.command()
def distinct(first: PatientId, second: PatientId, site: SiteFileOption) -> None:
    """Say that two patient ids with an equal picture are two patients all the same."""
    from secure_fed.clients.sitefile import read_site_file
    from secure_fed.operate.ledger_copies import tell_apart

    tell_apart(read_site_file(site), first, second)
    out.print("noted: two patients", highlight=False)


def _site_file(path: Path) -> SiteFile:
    from secure_fed.clients.sitefile import read_site_file

    return read_site_file(path)
