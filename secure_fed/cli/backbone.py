"""``secfacmic backbone``: weights of the frozen CLIP."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from secure_fed.cli.output import out

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
    from secure_fed.backbone import load_backbone, make_random_checkpoint
    from secure_fed.study import Backbone

    make_random_checkpoint(model, seed, file)
    backbone = load_backbone(Backbone(model=model, weights="random", seed=seed), file)
    out.print(f"{file}: {backbone.description}", highlight=False, soft_wrap=True)
    out.print(f"digest = {backbone.digest}", highlight=False, soft_wrap=True)
