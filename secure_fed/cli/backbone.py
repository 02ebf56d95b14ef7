"""``secfacmic backbone``: weights of the frozen CLIP."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from secure_fed.cli.data import say
from secure_fed.cli.output import Json, out, print_json
from secure_fed.core.errors import OutputError

app = typer.Typer(help="Weights of the frozen CLIP.", no_args_is_help=True)


@app.callback()
def _noun() -> None:
    """Weights of the frozen CLIP."""


@app.command()
def random(
    model: Annotated[str, typer.Argument(help="An open_clip model, builtin or of configs/models.")],
    file: Annotated[Path, typer.Option("--out", help="Checkpoint to write, .safetensors.")],
    seed: Annotated[int, typer.Option(min=0, help="Seed of the weights.")] = 0,
) -> None:
    """Write a checkpoint with seeded random weights, and print its digest."""
    from secure_fed.model.backbone import load_backbone, make_random_checkpoint
    from secure_fed.protocol.study_tables import Backbone

    if file.exists():
        raise OutputError(f"{file}: exists; expected no file there: remove it, or choose another name")
    make_random_checkpoint(model, seed, file)
    _tell(file, load_backbone(Backbone(model=model, weights="random", seed=seed), file))


@app.command()
def fetch(
    name: Annotated[str, typer.Argument(help="MODEL:TAG of open_clip, or hf-hub:OWNER/NAME.")],
    to: Annotated[Path, typer.Option("--to", metavar="DIR", help="Gets a folder to carry to the sites.")],
) -> None:
    """Download weights where there is internet, with all that loads them where there is none; print their digest."""
    from secure_fed.model.backbone_fetch import fetch as run

    _tell(*run(name, to))


@app.command()
def add(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="A checkpoint, or a folder in any form that is read.")],
    model: Annotated[
        str | None, typer.Option(metavar="NAME", help="MODEL or MODEL:TAG of a checkpoint; a folder says it itself.")
    ] = None,
    activation: Annotated[
        str | None,
        typer.Option(metavar="gelu|quickgelu", help="Of a checkpoint whose model there is with both."),
    ] = None,
    text: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder with config.json and tokenizer of its text model.")
    ] = None,
) -> None:
    """Recognise and check weights, and copy them to where every study that names them finds them.

    Forms, step by step, and what is not read: docs/backbones.md.
    """
    from secure_fed.model.backbone_fetch import add as run

    _tell(*run(path, model, activation, text))


@app.command()
def check(
    name: Annotated[str, typer.Argument(metavar="NAME|PATH", help="A backbone of the store, a file or a folder.")],
    images: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folders of images by class: how well prompts tell them apart.")
    ] = None,
    model: Annotated[str | None, typer.Option(metavar="NAME", help="As of backbone add.")] = None,
    activation: Annotated[str | None, typer.Option(metavar="gelu|quickgelu", help="As of backbone add.")] = None,
    text: Annotated[Path | None, typer.Option(metavar="DIR", help="As of backbone add.")] = None,
    json_: Json = False,
) -> None:
    """Say what a backbone is and how long it takes; with images, also whether something about it is off."""
    from secure_fed.operate.backbone_check import check_backbone

    report = check_backbone(name, images, model, activation, text)
    if json_:
        print_json(report)
        return
    for key, value in report.items():
        if key not in ("told", "zero_shot"):
            say(f"{key.replace('_', ' ')}: {value}")
    for line in report["told"]:
        say(f"assumed: {line}")
    if report["zero_shot"] is not None:
        rows = Table("zero-shot", "correct")
        for way, share in report["zero_shot"]["correct"].items():
            rows.add_row(way, "-" if share is None else f"{100 * share:.1f} %")
        out.print(rows)
        say(report["zero_shot"]["hint"])
        say(report["zero_shot"]["local"])


@app.command("list")
def list_(json_: Json = False) -> None:
    """The weights on this machine: those added, and those that come with secfacmic."""
    from secure_fed import configs
    from secure_fed.model.backbone_store import entries, store_folder

    store = store_folder()
    rows: list[dict[str, Any]] = [
        {
            "model": model,
            "tag": tag,
            "activation": entry.activation,
            "digest": entry.digest,
            "id": entry.id,
            "bytes": entry.bytes,
            "folder": str(path),
        }
        for path, entry in entries(store).items()
        for model, tag in dict.fromkeys((name.model, name.tag) for name in entry.names)
    ]
    packaged: list[dict[str, Any]] = [
        {"model": path.stem, "file": path.name, "bytes": path.stat().st_size}
        for path in sorted(configs.MODELS.glob("*.safetensors"))
        if not path.stem.endswith(".statistics")
    ]
    if json_:
        print_json({"store": str(store), "added": rows, "packaged": packaged})
        return
    table = Table("model", "tag", "activation", "size", "digest", "id", "where")
    for row in rows:
        table.add_row(
            row["model"],
            row["tag"] or "-",
            row["activation"],
            _size(row["bytes"]),
            row["digest"][:12],
            row["id"][:12],
            "added",
        )
    for row in packaged:
        table.add_row(row["model"], "-", "-", _size(row["bytes"]), "-", "-", f'comes along: file = "{row["file"]}"')
    out.print(table)
    out.print(f"added ones lie in {store}", highlight=False, soft_wrap=True)


def _size(count: int) -> str:
    return f"{count / 1e6:.1f} MB"


def _tell(path: Path, backbone: Any) -> None:
    say(f"{path}: {backbone.description}")
    say(f"found: {backbone.form.kind}; activation {backbone.activation}, context {backbone.context} tokens")
    how = backbone.form.preprocess
    say(f"images: {' x '.join(map(str, how['size']))}, mean {how['mean']}, std {how['std']}")
    say(f"tokenizer: {backbone.form.tokens.identity}")
    for line in backbone.form.told:
        say(f"assumed: {line}")
    say(f"id = {backbone.id}")
    say(f"digest = {backbone.digest}")
