"""``secfacmic study``: make, check and show study files."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.table import Table

from secure_fed.cli.output import Json, out, print_json
from secure_fed.study import Study, load_study, read_study, with_fields
from secure_fed.tomlfile import write_toml

app = typer.Typer(help="Make, check and show study files.", no_args_is_help=True)

StudyPath = Annotated[Path, typer.Argument(metavar="STUDY", help="A study.toml, a template, or a packaged config.")]
Seed = Annotated[int | None, typer.Option(min=0, help="Seed of splits, initial adapter and training.")]
Mode = Annotated[Literal["he", "plain"] | None, typer.Option(help="he (encrypted) or plain.")]


def template(path: Path, seed: int | None, mode: str | None) -> Study:
    """Read a template and apply what the command line changes."""
    study = read_study(path)
    changes = {name: value for name, value in (("seed", seed), ("mode", mode)) if value is not None}
    return with_fields(study, **changes) if changes else study


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
) -> None:
    """Make a study of a template: coordinator's key, initial adapter, prompt features, digests."""
    from privacy.keys import read_public_identity
    from secure_fed.new_study import new_study

    members = [read_public_identity(path) for path in site or []]
    made, backbone = new_study(template(study, seed, mode), members, into, checkpoint)
    out.print(f"{into / 'study.toml'}: study {made.name}, id {made.id}", highlight=False, soft_wrap=True)
    out.print(f"backbone: {backbone.description}", highlight=False, soft_wrap=True)
    for line in made.missing():
        out.print(f"still missing: {line}", highlight=False, soft_wrap=True)


@app.command()
def check(study: StudyPath, json_: Json = False) -> None:
    """Check a study file or a template; every error at once."""
    found = read_study(study)
    missing = found.missing()
    if not missing and study.with_suffix(".safetensors").exists():
        load_study(study)
    if json_:
        print_json({"name": found.name, "study_id": found.id, "complete": not missing, "missing": missing})
        return
    kind = "a template" if missing else "a complete study"
    out.print(f"{study}: {kind}, without errors; study id {found.id}", highlight=False, soft_wrap=True)


@app.command()
def show(study: StudyPath, json_: Json = False) -> None:
    """Show what a study says."""
    found = read_study(study)
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
        ("method", f"{method.adapter}, norm {method.norm}, loss {method.loss}, LMMD weight {method.lmmd_weight:g}"),
        ("rounds", f"{found.rounds} of {training.steps} steps, batch {training.batch_size}, {training.optimizer}"),
        ("sites", f"at least {found.min_sites}, at most {found.max_sites} in a sum; key maker {found.key_maker}"),
        ("values", f"{encoding.bits} bits, {encoding.lanes} lanes, bound {encoding.value_bound:g}"),
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
    host: Annotated[list[str], typer.Option(help="A name or address by which sites reach the server; once for each.")],
    into: Annotated[Path, typer.Option("--out", help="Folder for the certificates: tls in the server's state folder.")],
) -> None:
    """Make the study's certificate authority and the server's certificate."""
    from secure_fed.certificates import CA, CA_KEY, create_authority

    create_authority(into, host)
    out.print(f"give this file to every site: {into / CA}", highlight=False, soft_wrap=True)
    out.print(f"keep this file offline: {into / CA_KEY}", highlight=False, soft_wrap=True)


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
    from privacy.keys import read_public_identity
    from secure_fed.errors import StudyError
    from secure_fed.study import SiteKeys, StudySite

    found = read_study(study)
    identity = read_public_identity(public)
    if (study.parent / "server" / "run").exists():
        raise StudyError(
            f"{study}: a run has begun, and a study never changes then; "
            "let the site join by: secfacmic keys rotate --add"
        )
    listed = {member.name: member for member in found.sites}
    member = listed.get(identity.name, StudySite(name=identity.name, role=role, weight=weight))
    if member.keys is not None:
        raise StudyError(f"{study}: site {identity.name} has keys already; expected a site without: remove them first")
    listed[identity.name] = member.model_copy(update={"keys": SiteKeys(**identity.keys.model_dump())})
    changed = with_fields(found, sites=[entry.model_dump(mode="json", exclude_none=True) for entry in listed.values()])
    write_toml(study, changed)
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
    from secure_fed.errors import KeyFileError, StudyError
    from secure_fed.records import Chain, RecordFolder
    from server.coordinator import current_run, store_amendment

    agreed = load_study(study)
    run = current_run(state)
    if run is None:
        raise StudyError(f"{state}: no run has begun; a key can be rotated only in a run")
    try:
        data = sealed.read_bytes()
    except OSError as error:
        raise KeyFileError(f"{sealed}: cannot be read ({error.strerror}); expected a sealed key file") from error
    chain = Chain(agreed)
    for _ in RecordFolder(state / "runs" / run / "journal").replay(chain):
        pass
    store_amendment(agreed, state / "runs" / run, chain, data)
    out.print(f"in force from round {chain.round + 1} or the next", highlight=False, soft_wrap=True)
