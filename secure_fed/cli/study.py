"""``secfacmic study``: make, check and show study files."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.table import Table
from rich.text import Text

from secure_fed import configs
from secure_fed.cli.data import duration, progress
from secure_fed.cli.output import Json, command_line, out, print_json
from secure_fed.core.errors import StudyError
from secure_fed.protocol.study import Template, load_study, read_study_file, read_template, with_fields

app = typer.Typer(help="Make, check and show study files.", no_args_is_help=True)

StudyPath = Annotated[Path, typer.Argument(metavar="STUDY", help="A study.toml, a template, or a packaged config.")]
Seed = Annotated[int | None, typer.Option(min=0, help="Seed of splits, initial adapter and training.")]
Mode = Annotated[Literal["he", "plain"] | None, typer.Option(help="he (encrypted) or plain.")]


def template(path: Path, seed: int | None, mode: str | None) -> Template:
    """Read a template and apply what the command line changes."""
    found = read_template(path)
    changes = {name: value for name, value in (("seed", seed), ("mode", mode)) if value is not None}
    return with_fields(found, **changes) if changes else found


@app.command()
def new(
    study: StudyPath,
    into: Annotated[Path, typer.Option("--out", help="Folder for study.toml and study.safetensors.")],
    site: Annotated[list[Path] | None, typer.Option(help="A site's public file; once for each site.")] = None,
    seed: Seed = None,
    mode: Mode = None,
    checkpoint: Annotated[
        Path | None, typer.Option(help="The backbone's weights, if not where the template says.")
    ] = None,
    public: Annotated[
        Path | None,
        typer.Option(
            help="Folder of public images, or statistics of such, for features.basis; by default the backbone's own."
        ),
    ] = None,
    epsilon: Annotated[
        float | None,
        typer.Option(min=0.01, max=100, help="The budget of each site: take the method that is advised for it."),
    ] = None,
    patients: Annotated[
        int | None,
        typer.Option(min=1, help="With --epsilon: about how many training patients the smallest site has, declared."),
    ] = None,
) -> None:
    """Make a study of a template: coordinator's key, initial adapter, prompt features, digests."""
    chosen = template(study, seed, mode)  # before anything that takes long to load
    from secure_fed.clients.encoding import USUAL, expected_seconds
    from secure_fed.operate.new_study import new_study, update_size
    from secure_fed.privacy.keys import read_public_identity

    if (epsilon is None) != (patients is None):
        raise typer.BadParameter("--epsilon and --patients go together: the method hangs on both")
    if epsilon is not None and patients is not None:
        from secure_fed.model.public_statistics import has_packaged_statistics
        from secure_fed.operate.advice import advise, as_advised

        there = public is not None or has_packaged_statistics(chosen.backbone.model)
        advice = advise(epsilon, patients, public=there, one_sum=chosen.method.one_sum)
        chosen = as_advised(chosen, advice)
        out.print(f"method: {advice.words}", highlight=False, soft_wrap=True)
    members = [read_public_identity(path) for path in site or []]
    made, backbone = new_study(chosen, members, into, checkpoint, public)
    out.print(f"{into / 'study.toml'}: study {made.name}, id {made.id}", highlight=False, soft_wrap=True)
    out.print(f"backbone: {backbone.description}", highlight=False, soft_wrap=True)
    long = duration(expected_seconds(backbone.seconds_per_image([USUAL]), 1000))
    out.print(
        f"encoding at a site like this machine: {long} for 1000 images of {USUAL.width} x {USUAL.height} pixels, "
        "reading them apart; data check measures a site's own files",
        highlight=False,
        soft_wrap=True,
    )
    out.print(f"an update: {update_size(into / 'study.toml', made)}", highlight=False, soft_wrap=True)
    for line in made.missing():
        out.print(f"still missing: {line}", highlight=False, soft_wrap=True)


@app.command()
def check(study: StudyPath, json_: Json = False) -> None:
    """Check a study file or a template; every error at once."""
    if not configs.find(study).exists():
        raise StudyError(configs.unknown(study, "study"))  # before anything that takes long to load
    from secure_fed.operate.new_study import check_study, update_size

    found = check_study(study)
    missing = found.missing()
    if json_:
        agreeing = asdict(found.quorum(found.sites))
        print_json({"name": found.name, "study_id": found.id, "complete": not missing, "missing": missing,
                    "quorum": agreeing})  # fmt: skip
        return
    kind = "a template" if missing else "a complete study"
    out.print(f"{study}: {kind}, without errors; study id {found.id}", highlight=False, soft_wrap=True)
    out.print(f"an update: {update_size(study, found)}", highlight=False, soft_wrap=True)
    for line in found.quorum(found.sites).words:
        out.print(line, highlight=False, soft_wrap=True)


@app.command()
def init(
    folders: Annotated[
        list[Path],
        typer.Argument(metavar="DIR...", help="A folder of images for each site; or one, to be split into sites."),
    ],
    into: Annotated[Path, typer.Option("--out", metavar="FILE", help="The template.")],
    held_out: Annotated[
        list[Path] | None,
        typer.Option(metavar="DIR", help="A site that only tests; once for each. Else the last of four or more."),
    ] = None,
    partition: Annotated[
        str | None,
        typer.Option(metavar="HOW", help="How one folder is split: iid, dirichlet:0.5 or column:NAME of its manifest."),
    ] = None,
    sites: Annotated[int | None, typer.Option(min=3, max=1000, help="How many one folder is split into; 4.")] = None,
    epsilon: Annotated[
        float | None, typer.Option(min=0.01, max=100, help="The budget that sites will have, for the advice.")
    ] = None,
) -> None:
    """Draft a template for folders of public or simulated images, to be reviewed line by line."""
    from secure_fed.core.errors import OutputError
    from secure_fed.core.storage import refuse_foreign, write_durable
    from secure_fed.operate.study_draft import draft_study

    if into.exists():
        raise OutputError(f"{into}: exists; expected no file there: remove it, or choose another name")
    refuse_foreign(into, lambda _: False)
    with progress("comparing images") as tell:
        draft = draft_study(
            folders, into.stem, held_out=held_out or (), partition=partition, sites=sites, epsilon=epsilon,
            progress=tell,
        )  # fmt: skip
    write_durable(into, draft.text.encode())
    for line in draft.told:
        out.print(line, highlight=False, soft_wrap=True)
    names = ", ".join(f"{site.name}{' (held out)' if site.role == 'observer' else ''}" for site in draft.template.sites)
    for line in (
        f"{into}: sites {names}; classes {', '.join(draft.template.class_names)}",
        f"review it, the prompts first; then: {command_line('study', 'check', into)}",
        f"and: {command_line('simulate', into, '--data', draft.data, '--out', into.with_suffix(''))}",
    ):
        out.print(line, highlight=False, soft_wrap=True)


@app.command("list")
def list_(json_: Json = False) -> None:
    """List the templates that come with secfacmic; each runs by its name, and can be copied with study show --toml."""
    found = configs.packaged()
    if json_:
        print_json(found)
        return
    table = Table("name", "what it is", box=None)
    for name, first in found.items():
        table.add_row(name, Text(first))
    out.print(table)


@app.command()
def show(
    study: StudyPath,
    as_toml: Annotated[bool, typer.Option("--toml", help="The file itself, with its comments, to be copied.")] = False,
    json_: Json = False,
) -> None:
    """Show what a study says."""
    found = read_study_file(study)
    if as_toml:
        typer.echo(configs.find(study).read_text(encoding="utf-8"), nl=False)
        return
    if json_:
        print_json({"study_id": found.id, **found.model_dump(mode="json", exclude_none=True)})
        return
    facts = Table(show_header=False, box=None)
    encoding, training, method = found.encoding, found.training, found.method
    for key, value in (
        ("study", found.name),
        ("id", found.id),
        ("mode", found.mode),
        ("backbone", f"{found.backbone.model}, {found.backbone.weights}, digest {found.backbone.digest or 'not set'}"),
        ("method", f"{method.adapter}, norm {method.norm}, loss {method.loss}, domain term: {method.domain_term}"),
        ("head", "one at each site, never shared" if method.private_head else "none of a site's own"),
        *((("coordinates", found.features.origin),) if found.features.origin else ()),
        ("aggregation", f"{found.aggregation.rule}, learning rate {found.aggregation.learning_rate:g}"),
        (
            "rounds",
            f"{found.rounds} of {training.steps} steps, batch {training.batch_size}, {training.optimizer}"
            if not method.sums
            else str(found.rounds),
        ),
        *((("training", found.work),) if method.sums else ()),
        ("sites", f"at least {found.min_sites}, at most {found.max_sites} in a sum; key maker {found.key_maker}"),
        ("values", f"{encoding.bits} bits, {found.packing().lanes} lanes, bound {encoding.value_bound:g}"),
        ("seed", str(found.seed)),
    ):
        facts.add_row(key, value)
    out.print(facts)
    members = Table("site", "role", "weight", "keys")
    for member in found.sites:
        members.add_row(member.name, member.role, f"{member.weight:g}", "yes" if member.keys else "missing")
    out.print(members)
    classes = Table("class", "prompts")
    for entry in found.classes:
        classes.add_row(entry.name, "\n".join(entry.prompts))
    out.print(classes)


@app.command()
def ca(
    into: Annotated[Path, typer.Option("--out", help="Folder of the certificates: tls in the server's state folder.")],
    host: Annotated[
        list[str] | None, typer.Option(help="A name or address by which sites reach the server; once for each.")
    ] = None,
    renew: Annotated[
        bool, typer.Option("--renew", help="Issue the server's certificate anew, by the same authority; --host adds.")
    ] = False,
    ca_key: Annotated[
        Path | None, typer.Option(help="The authority's key, to renew with, where it is kept offline.")
    ] = None,
    cert: Annotated[
        Path | None, typer.Option(help="The hospital's own certificate for the server (PEM), intermediates after it.")
    ] = None,
    key: Annotated[Path | None, typer.Option(help="Its private key (PEM, without a passphrase).")] = None,
    authority: Annotated[
        Path | None, typer.Option(help="The authority that issued it (PEM): what sites trust.")
    ] = None,
) -> None:
    """Make the study's certificate authority and the server's certificate, or take the hospital's own.

    A running server takes a renewed certificate by itself.
    """
    from secure_fed.transport import certificates

    hosts = host or []
    if renew:
        if authority is not None or (cert is None) != (key is None) or (cert is not None and ca_key is not None):
            raise typer.BadParameter("--renew takes --ca-key, or --cert and --key; the authority stays as it is")
        if cert is not None and key is not None:
            until = certificates.renew_adopted(into, hosts, cert, key)
        else:
            until = certificates.renew_certificate(into, hosts, ca_key)
        names = ", ".join(certificates.names_held(into))
        out.print(f"valid until {until:%Y-%m-%d}, for {names}", highlight=False, soft_wrap=True)
        return
    if ca_key is not None:
        raise typer.BadParameter("--ca-key is for --renew")
    given = [path for path in (cert, key, authority) if path is not None]
    if not given:
        certificates.create_authority(into, hosts)
    elif cert is not None and key is not None and authority is not None:
        until = certificates.adopt_certificate(into, hosts, cert, key, authority)
        out.print(f"valid until {until:%Y-%m-%d}", highlight=False)
    else:
        raise typer.BadParameter("a certificate of your own takes all of --cert, --key and --authority")
    out.print(f"give this file to every site: {into / certificates.CA}", highlight=False, soft_wrap=True)
    if not given:
        out.print(f"keep this file offline: {into / certificates.CA_KEY}", highlight=False, soft_wrap=True)


@app.command("add-site")
def add_site(
    study: Annotated[Path, typer.Argument(metavar="STUDY", help="A study.toml of which no run has begun.")],
    public: Annotated[Path, typer.Argument(metavar="NAME.pub", help="The site's public file.")],
    role: Annotated[
        Literal["train", "observer"], typer.Option(help="Of a site that the study does not list.")
    ] = "train",
    weight: Annotated[float, typer.Option(help="Its public weight in the average, in (0, 1].")] = 1.0,
) -> None:
    """Put a site's public keys into a study before its first run."""
    from secure_fed.operate.new_study import add_site as add
    from secure_fed.privacy.keys import read_public_identity

    identity = read_public_identity(public)
    changed = add(study, identity, role, weight)
    out.print(f"{study}: site {identity.name} added; study id {changed.id}", highlight=False, soft_wrap=True)
    for line in changed.missing():
        out.print(f"still missing: {line}", highlight=False, soft_wrap=True)


@app.command()
def amend(
    study: Annotated[Path, typer.Argument(metavar="STUDY", help="The study's study.toml.")],
    sealed: Annotated[Path, typer.Argument(metavar="FILE", help="The sealed key file of: secfacmic keys rotate.")],
    state: Annotated[Path, typer.Option(help="The server's state folder.")],
) -> None:
    """Bring a rotated key into force with the next round, whether the server is running or not."""
    from secure_fed.core.layout import ServerState
    from secure_fed.protocol.sealed_key import exact_warning, read_sealed_file
    from secure_fed.server.orders import amend_run

    agreed = load_study(study)
    header, data = read_sealed_file(sealed, agreed)
    first, last = amend_run(agreed, state, data)
    out.print(f"in force from round {first} or the next", highlight=False, soft_wrap=True)
    joining = {site.name for site in header.added}
    asked = ", ".join(name for name in header.recipients if name not in joining and name != header.maker)
    trusted = () if header.authority is None else (f"the authority {header.authority}",)
    for what, names in (("join", joining), ("leave", header.removed), ("becomes the server's", trusted)):
        if names:
            allowed = '"all" or "removals"' if what == "leave" else '"all"'
            out.print(
                f"{', '.join(sorted(names))} {what}: {asked} must have said yes before, each by its site.toml "
                f"(amendments = {allowed}) or by hand (secfacmic keys accept {sealed.name}); whose people have "
                "not, that site ends with exit code 11 until they do"
                + (f"; for who joins at most {last - first + 1} of {last} rounds are left" if what == "join" else ""),
                highlight=False,
                soft_wrap=True,
            )
    if header.authority is not None:
        out.print(
            "every site must have the new ca.crt before, appended to the file that its site.toml names as authority; "
            f"now put the new ca.crt, server.crt and server.key into {ServerState(state).certificates}, and start the "
            "server again",
            highlight=False,
            soft_wrap=True,
        )
    warning = exact_warning(agreed.study, header)
    if warning is not None:
        out.print(warning, highlight=False, soft_wrap=True)


State = Annotated[Path, typer.Option(help="The server's state folder.")]
Made = Annotated[Path, typer.Argument(metavar="STUDY", help="The study's study.toml.")]


@app.command()
def pause(study: Made, state: State) -> None:
    """Let no further round begin, until study resume; a round whose cohort is chosen is closed before.

    Sites stay connected and are asked nothing.
    """
    from secure_fed.server.orders import hold_run

    due = hold_run(load_study(study), state, paused=True)
    out.print(
        f"round {due} does not begin, or is closed and the next does not; go on with: "
        f"{command_line('study', 'resume', study, '--state', state)}",
        highlight=False,
        soft_wrap=True,
    )


@app.command()
def resume(study: Made, state: State) -> None:
    """Let rounds begin again after study pause; without a pause, let round 1 begin though not all are ready."""
    from secure_fed.server.orders import Orders, hold_run, open_run

    agreed = load_study(study)
    due = hold_run(agreed, state, paused=False)
    held = Orders(open_run(agreed, state)[0]).lobby
    out.print(f"round {due} is due" + (", when all that train are ready" if held else ""), highlight=False)


@app.command()
def extend(
    study: Made,
    state: State,
    rounds: Annotated[int, typer.Option(min=1, metavar="N", help="How many rounds the run is to have in all.")],
) -> None:
    """Let the run have more rounds than the study says, whether it goes on or has closed its last one.

    In force with the next round. Each site's people accept them first, each at its own site.
    """
    from secure_fed.server.orders import extend_run

    agreed = load_study(study)
    done = extend_run(agreed, state, rounds)
    out.print(
        f"{done} rounds are closed; the run has {rounds} from the next one on, as soon as the server runs. The people "
        f"of every site must have said yes before (secfacmic site accept {study.name} --site site.toml --rounds "
        f"{rounds}); one whose have not ends with exit code 13 until they do. A site with a budget sends updates for "
        "the rounds that it planned for, and takes the others",
        highlight=False,
        soft_wrap=True,
    )


@app.command()
def end(
    study: Made,
    state: State,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask; it cannot be taken back.")] = False,
    lost: Annotated[
        bool, typer.Option("--lost", help="Too few sites can ever come back: give up the round that waits for them.")
    ] = False,
) -> None:
    """End the run before its last round: all sites end, and keep the adapter of the last one that was closed.

    Whether the server is running or not: it tells the sites when it runs, by a signed record. A round whose cohort is
    chosen is closed before; with --lost it is given up, and server and sites end with 70.
    """
    from secure_fed.server.orders import end_run, open_run

    agreed = load_study(study)
    rounds = open_run(agreed, state)[1].rounds  # before anybody is asked
    if not yes:
        typer.confirm(f"end the run of study {agreed.study.name}, for ever?", abort=True, err=True)
    done = end_run(agreed, state, lost)
    out.print(
        f"{done} of {rounds} rounds are closed; the run ends after them, "
        f"{'without' if lost else 'or after'} the one under way, as soon as the server runs",
        highlight=False,
        soft_wrap=True,
    )


@app.command()
def diff(
    before: Annotated[Path, typer.Argument(metavar="A", help="A study.toml or template.")],
    after: Annotated[Path, typer.Argument(metavar="B", help="Another version of it.")],
    json_: Json = False,
) -> None:
    """Show what changed between two versions of a study; exit status 0 whether it did or not."""
    from secure_fed.protocol.study_differences import differences

    first, second = read_study_file(before), read_study_file(after)
    changes = differences(first, second)
    if json_:
        ids = {"before": first.id, "after": second.id}
        rows = [{"field": change.field, "before": change.before, "after": change.after} for change in changes]
        print_json({**ids, "same": first.id == second.id, "changes": rows})
        return
    if not changes:
        out.print(f"the same study, id {first.id}", highlight=False, soft_wrap=True)
        return
    table = Table("field", "before", "after")
    for change in changes:
        table.add_row(change.field, _cell(change.before), _cell(change.after))
    out.print(table)
    out.print(f"id {first.id}\nis now {second.id}", highlight=False, soft_wrap=True)


def _cell(value: object) -> str:
    return "-" if value is None else str(value)


@app.command()
def close(
    study: Annotated[Path, typer.Argument(metavar="STUDY", help="The study's study.toml.")],
    site: Annotated[Path | None, typer.Option(help="Close it at this site: its site.toml, or its folder.")] = None,
    state: Annotated[Path | None, typer.Option(help="Close it at the server: its state folder.")] = None,
    abandon: Annotated[bool, typer.Option("--abandon", help="Close it though rounds are missing.")] = False,
    identity: Annotated[
        bool, typer.Option("--identity", help="Destroy the site's private keys too, if no other study needs them.")
    ] = False,
    json_: Json = False,
) -> None:
    """Destroy a study's keys and outboxes here, for ever, and say what remains."""
    from secure_fed.operate.closing import close_server, close_site

    if (site is None) == (state is None) or (identity and site is None):
        raise typer.BadParameter("expected --site (perhaps with --identity) or --state, and one of them")
    if site is not None:
        from secure_fed.clients.sitefile import read_site

        file, agreed = read_site(site, study)
        done = close_site(Path(file.state), Path(file.identity), agreed, abandon=abandon, destroy_identity=identity)
    else:
        assert state is not None
        done = close_server(state, load_study(study), abandon=abandon)
    if json_:
        print_json({"rounds": done.rounds, "destroyed": done.destroyed, "remains": done.remains})
        return
    for what, count in done.destroyed.items():
        out.print(f"destroyed: {count} files, {what}", highlight=False, soft_wrap=True)
    for what, words in done.remains.items():
        out.print(f"remains: {what}: {words}", highlight=False, soft_wrap=True)
