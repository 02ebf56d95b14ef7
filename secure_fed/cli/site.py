"""``secfacmic site``: a site's identity, what it agrees to, and what has left it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.table import Table

from secure_fed.cli.output import SITE_HELP, Delta, Epsilon, Json, out, print_json
from secure_fed.protocol.quorum import Quorum

app = typer.Typer(help="A site's identity, what it agrees to, and what has left it.", no_args_is_help=True)

SitePath = Annotated[Path, typer.Option("--site", help=SITE_HELP)]


@app.command()
def init(
    name: Annotated[str, typer.Argument(help="The site's name in the study.")],
    folder: Annotated[Path, typer.Option("--out", help="Folder for the keys; they never leave it.")] = Path("identity"),
    passphrase: Annotated[bool, typer.Option(help="Ask for a passphrase that encrypts the private keys.")] = False,
    data: Annotated[
        Path | None, typer.Option(help="The site's images; with this, site.toml is written here too.")
    ] = None,
    server: Annotated[str | None, typer.Option(metavar="HOST:PORT", help="Where the server will be, if known.")] = None,
    kind: Annotated[Literal["patients", "public", "simulated"], typer.Option(help="Of the data.")] = "patients",
) -> None:
    """Make the site's keys, the public file to send to the coordinator and, with --data, its site.toml.

    Keys that are there are kept.
    """
    from secure_fed.clients.sitefile import new_site_file
    from secure_fed.privacy.keys import create_identity

    site_file = None if data is None else new_site_file(Path("site.toml"), name, folder, data, kind, server)
    chosen = typer.prompt("passphrase", hide_input=True, confirmation_prompt=True, err=True) if passphrase else ""
    kept = (folder / "signing.key").exists()
    create_identity(folder, name, chosen)
    if kept:
        _say(f"{folder}: the keys of {name} were there, and are kept")
    if site_file is not None:
        from secure_fed.core.storage import write_durable
        from secure_fed.core.tomlfile import explained_toml

        write_durable(Path("site.toml"), explained_toml(site_file).encode())
        _say("site.toml: every key there is, with its meaning; look through it: it is this site's own policy")
        _say(f"site.toml: expects what the coordinator sends in {Path(site_file.study).parent}/")
        if data is not None and not data.is_dir():
            _say(f"{data}: no such folder yet; the images must be there before secfacmic client --site site.toml")
    _say(f"send this file to the coordinator: {folder / name}.pub")


@app.command()
def accept(
    study: Annotated[Path, typer.Argument(metavar="STUDY", help="The study's study.toml, as the coordinator sent it.")],
    site: SitePath,
    by: Annotated[
        str | None, typer.Option(metavar="NAME", help="Who accepts; asked for at a terminal if not given.")
    ] = None,
    epsilon: Epsilon = None,
    delta: Delta = None,
    again: Annotated[
        bool, typer.Option("--again", help="Accept one run more of a study that this site has taken part in.")
    ] = False,
    rounds: Annotated[
        int | None, typer.Option(metavar="N", help="Accept so many, where the run is to have more than the study says.")
    ] = None,
    html: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write it as a page to be signed; without --by nothing is recorded."),
    ] = None,
    json_: Json = False,
) -> None:
    """Show what will leave this site in a study, to whom and under which budget, and record who accepts it."""
    from secure_fed.clients.acceptance import (
        again_words,
        as_of_key,
        record_acceptance,
        require_acceptance,
        rounds_to_accept,
        terms,
        when,
    )
    from secure_fed.clients.keyring import membership
    from secure_fed.clients.sitefile import read_site, with_budget

    if html is not None:
        from secure_fed.core.storage import refuse_foreign
        from secure_fed.report.page import is_page

        refuse_foreign(html, is_page)
    file, agreed = read_site(site, study)
    identity = membership(file, agreed).identity
    file = with_budget(file, epsilon, delta)
    file.refuse_study(agreed.study)
    accepts = rounds_to_accept(file, agreed, identity.keys.signing, rounds)
    shown = terms(file, agreed, accepts) | as_of_key(file, agreed)
    further = again_words(file, agreed) if again else []
    if again:
        shown["again"] = further
    if json_:
        print_json(shown)
    else:
        _show_terms(shown)
        for line in further:
            _say(line)
    if html is not None:
        from secure_fed.core.storage import write_durable
        from secure_fed.report.document_page import consent_page

        write_durable(html, consent_page(shown).encode())
        if by is None:
            if not json_:
                _say(f"{html}: to be read, printed and signed; nothing is recorded yet: then say --by NAME")
            return
    if by is None and sys.stdin.isatty():
        by = typer.prompt("your name, to accept this for the site (empty: do not)", default="", err=True).strip()
    path = record_acceptance(file, agreed, identity, by or "", again=again, rounds=accepts)
    header = require_acceptance(file, agreed, identity.keys.signing)
    if not json_:
        times = "" if header.runs == 1 else f", for {header.runs} runs of it in all"
        _say(f"accepted by {header.by} at {when(header.accepted_ms)}{times}; recorded and signed in {path}")


@app.command()
def void(
    site: SitePath,
    round_: Annotated[
        int, typer.Option("--round", metavar="N", min=1, help="The round that is open, or that of the last record.")
    ],
    by: Annotated[
        str | None, typer.Option(metavar="NAME", help="Who decides; asked for at a terminal if not given.")
    ] = None,
) -> None:
    """Give a round up: this site sends nothing more for it; a quorum's words let it begin anew."""
    from secure_fed.clients.site import Site
    from secure_fed.clients.sitefile import read_site
    from secure_fed.core.storage import exclusive

    file, agreed = read_site(site, None)
    with exclusive(file.state_folder.path):
        opened = Site(file, agreed)
        _say(f"{file.site} will send nothing more for what was begun of round {round_}; it cannot be taken back.")
        _say("Adapter, ledger and stored update stay as they are. The round begins anew once a quorum has said so.")
        for line in opened.abandoned_words:
            _say(line)
        by = _who_decides(by, "give it up", "the round was not given up")
        revealed = opened.void(round_)
    _say(f"given up by {by}; it had{'' if revealed else ' not'} revealed. Start the client again: it tells the server")


@app.command()
def release(
    site: SitePath,
    by: Annotated[
        str | None, typer.Option(metavar="NAME", help="Who decides; asked for at a terminal if not given.")
    ] = None,
) -> None:
    """Let this site reveal once more at the adapter it holds, to other sites than before."""
    from secure_fed.clients.site import Site
    from secure_fed.clients.sitefile import read_site
    from secure_fed.core.storage import exclusive
    from secure_fed.protocol.sealed_key import EXACT

    file, agreed = read_site(site, None)
    with exclusive(file.state_folder.path):
        opened = Site(file, agreed)
        if opened.budgeted:
            _say(f"{file.site} has a budget: its noise is its own, and nothing is to be released")
            return
        before = opened.revealed_to
        told = "not revealed yet" if before is None else f"revealed to {', '.join(before) or 'nobody knows whom'}"
        _say(f"at the adapter that {file.site} holds it has {told}; others may have.")
        _say("Whoever has that sum and another one at this adapter can compute, by difference, the update of each site")
        _say("that is in one and not in the other, exactly if it is one site: also of one that has left since.")
        if opened.exact:
            _say(EXACT)
        _say("The people of all these sites must agree; each says so at its own site.")
        if agreed.study.mode == "he":
            _say("A site that was in that sum and cannot be in the next must have left before: by its own word,")
            _say("secfacmic site retire, or removed, secfacmic keys rotate --remove SITE at the key maker.")
        by = _who_decides(by, "release it", "nothing was released")
        opened.release()
    _say(f"released by {by}, for one round; start the client again")


@app.command()
def retire(
    site: SitePath,
    by: Annotated[
        str | None, typer.Option(metavar="NAME", help="Who decides; asked for at a terminal if not given.")
    ] = None,
) -> None:
    """Let this site train no more in the run, from the next round on; it goes on as an observer."""
    from secure_fed.clients.site import Site
    from secure_fed.clients.sitefile import read_site
    from secure_fed.core.storage import exclusive

    file, agreed = read_site(site, None)
    with exclusive(file.state_folder.path):
        opened = Site(file, agreed)
        before = opened.revealed_to
        _say(f"{file.site} will train no more in this run; it cannot be taken back.")
        if before is not None:
            told = ", ".join(before) or "sites that nobody here knows"
            _say(f"At the adapter that it holds it has revealed to {told}. If they go on at that adapter without it,")
            _say(f"whoever has both sums, as every member has, can compute the update of {file.site} by difference.")
        by = _who_decides(by, "retire it", "the site was not retired")
        opened.retire()
    _say(f"retired by {by}. Start the client again: it tells the server")


def _who_decides(by: str | None, deed: str, not_done: str) -> str:
    """The name of who decides, from the option or a terminal.

    Raises:
        NotAcceptedError: nobody's was given.
    """
    from secure_fed.core.errors import NotAcceptedError

    if by is None and sys.stdin.isatty():
        by = typer.prompt(f"your name, to {deed} (empty: do not)", default="", err=True).strip()
    if not by:
        raise NotAcceptedError(f"nobody's name was given; {not_done}: give --by NAME")
    return by


@app.command()
def sent(
    site: Annotated[Path, typer.Argument(metavar="SITE", help=SITE_HELP)],
    json_: Json = False,
) -> None:
    """List every message that left this site for the server: when, in which round, how many bytes, which digest."""
    from secure_fed.clients.outgoing_log import SentList
    from secure_fed.clients.sitefile import read_site_file

    file = read_site_file(site)
    rows = SentList(Path(file.state)).read()
    if json_:
        print_json({"site": file.site, "messages": len(rows), "bytes": sum(row.bytes for row in rows),
                    "sent": [row.model_dump(mode="json", exclude={"previous"}) for row in rows]})  # fmt: skip
        return
    table = Table("time (UTC)", "round", "what", "bytes", "digest")
    for row in rows:
        table.add_row(row.time, str(row.round), row.code, str(row.bytes), row.digest[:16])
    out.print(table)
    _say(f"{file.site}: {len(rows)} messages, {sum(row.bytes for row in rows)} bytes; the list is whole")


def _show_terms(shown: dict[str, Any]) -> None:
    leaves, budget = shown["leaves"], shown["budget"]
    _say(f"study {shown['study']}, digest {shown['study_id']}")
    _say(f"this site: {shown['site']}, role {shown['role']}, mode {shown['mode']}")
    members = Table("member", "role", "weight", "")
    for member in shown["members"]:
        maker = "makes the study's key" if member["key_maker"] else ""
        members.add_row(member["name"], member["role"], f"{member['weight']:g}", maker)
    out.print(members)
    now = shown["members_now"]
    if now is not None and sorted(now) != sorted(member["name"] for member in shown["members"]):
        _say(f"hospitals have joined or left since: by the newest key here the members are {', '.join(now)}")
        _say("rounds that were closed before this site takes part are not asked of it")
        if shown["rounds_left"] is not None:
            _say(f"when that key was made {shown['rounds_left']} of {shown['rounds_now']} rounds were left: a site "
                 "that joins with it sends at most so many updates")  # fmt: skip
    for line in Quorum(**shown["quorum"]).words:
        _say(line)
    _say("")
    _say("what leaves this site, and nothing else, to the study's server:")
    if leaves["updates"]:
        cover = "encrypted and signed" if shown["mode"] == "he" else "signed, NOT encrypted: the server reads it"
        _say(
            f"- {leaves['updates']} updates, one a round, {cover}: {leaves['update_bytes']} bytes each "
            f"({leaves['update_values']} numbers of {leaves['update_bits']} bits) and at most "
            f"{leaves['update_header_bytes']} bytes around it, which say in clear:"
        )
        for name, words in leaves["update_fields"].items():
            _say(f"    {name}: {words}")
        for line in leaves["statistics"]:
            _say(f"  inside the encrypted numbers, {line}")
        if leaves["validation_counts"]:
            _say("  inside the encrypted numbers: how many validation images, and how many of them are right")
    else:
        _say("- no update: an observer")
    _say("- replies to the server's requests, which have these fields:")
    for name, words in leaves["reply_fields"].items():
        _say(f"    {name}: {words}")
    _say("- that it is connected: its address, its public key, when, and how long it takes to answer")
    if leaves["never_alone"]:
        _say(f"nowhere but inside the encrypted numbers, as said above, and there in sums over all sites: "
             f"{leaves['never_alone']}")  # fmt: skip
    _say(f"never: {leaves['never']}")
    _say("")
    if budget is not None:
        _say(
            f"budget: all that leaves is ({budget['epsilon']:g}, {budget['delta']:g})-differentially private for each "
            f"{budget['unit']} of this site, against everybody"
        )
    elif leaves["updates"]:
        _say("budget: none. The sums, which all sites of the study open, are not differentially private")
    _say("")


def _say(text: str) -> None:
    out.print(text, highlight=False, soft_wrap=True)
