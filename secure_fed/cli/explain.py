"""``secfacmic explain``: what an exit code means."""

from __future__ import annotations

from typing import Annotated

import typer

from secure_fed.cli.output import Json, out, print_json


def explain(
    code: Annotated[int, typer.Argument(min=0, max=255, help="An exit code of secfacmic.")], json_: Json = False
) -> None:
    """Say what an exit code means, where it comes from and what to do."""
    from secure_fed.core.exit_codes import pages

    found = pages()
    if code not in found:
        known = ", ".join(str(one) for one in sorted(found))
        raise typer.BadParameter(f"{code} is no exit code of secfacmic; expected one of {known}")
    page = found[code]
    if json_:
        print_json({"code": code, "name": page.name, "text": page.text})
        return
    out.print(f"{code} {page.name}\n", highlight=False)
    out.print(page.text, highlight=False)
