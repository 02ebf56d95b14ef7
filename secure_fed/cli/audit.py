"""``secfacmic audit``: try to refute what private training claims, on synthetic patients."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from secure_fed.cli.output import Json, out, print_json

if TYPE_CHECKING:
    from secure_fed.privacy.audit import AuditResult


def audit(
    epsilon: Annotated[
        float | None, typer.Option(min=0.01, max=100, help="The claim to refute; 3 if not given.")
    ] = None,
    delta: Annotated[float | None, typer.Option(min=1e-12, max=1e-3, help="The claim's delta; 1e-5.")] = None,
    study: Annotated[
        Path | None, typer.Option(help="A study whose [privacy] constants to train with; else the defaults.")
    ] = None,
    site: Annotated[
        Path | None,
        typer.Option(metavar="SITE_TOML", help="Audit this site's own rounds, under its own budget, instead."),
    ] = None,
    canaries: Annotated[int | None, typer.Option(min=10, max=100_000, help="Canaries, m; 1000, of a site 400.")] = None,
    guesses: Annotated[int, typer.Option(min=2, help="Guesses, r; fix it before you look.")] = 100,
    json_: Json = False,
) -> None:
    """Audit this machine's private training in one run, and attack it, on synthetic patients.

    With --site the real rounds of that site, with its study and settings and a ledger that is thrown away: first every
    integer is held against what the ledger says was paid, then canaries are looked for in what would leave. No
    patient's data are read and no budget is spent.
    """
    import torch

    torch.set_num_threads(1)  # on arrays so small, more threads mostly wait for each other
    if site is not None:
        if (epsilon, delta, study) != (None, None, None):
            raise typer.BadParameter("expected --site alone: a site's budget and study are its own")
        _audit_site(site, canaries or 400, guesses, json_)
        return
    from secure_fed.privacy.attacks import attack_with_and_without
    from secure_fed.privacy.audit import audit as run
    from secure_fed.protocol.study import read_study_file
    from secure_fed.protocol.study_tables import PrivateTraining

    epsilon, delta, canaries = epsilon or 3.0, delta or 1e-5, canaries or 1000
    settings = PrivateTraining() if study is None else read_study_file(study).privacy
    result = run(epsilon, delta, settings, canaries=canaries, guesses=min(guesses, canaries))
    private, plain = attack_with_and_without(epsilon, delta)
    if json_:
        rates = {"false_positive_rate": private.false_positive_rate, "shadows": private.shadows}
        attacks = {
            "with": {"true_positive_rate": private.true_positive_rate, "auc": private.auc, **rates},
            "without": {"true_positive_rate": plain.true_positive_rate, "auc": plain.auc, **rates},
        }
        print_json(_document(result) | {"attack": attacks})
    else:
        out.print(result.report, highlight=False)
        out.print(
            f"LiRA with {private.shadows} shadow models on {private.patients} synthetic patients learnt by heart: true "
            f"positive rate {100 * private.true_positive_rate:.1f} % at {100 * private.false_positive_rate:g} % false "
            f"positives (without privacy {100 * plain.true_positive_rate:.1f} %). An attack, not a bound.",
            highlight=False,
        )
    _refuse(result)


def _audit_site(path: Path, canaries: int, guesses: int, json_: bool) -> None:
    from secure_fed.clients.canaries import audit_site
    from secure_fed.clients.sitefile import read_site

    file, agreed = read_site(path)
    result = audit_site(file, agreed, canaries=canaries, guesses=min(guesses, canaries))
    if json_:
        print_json({"site": file.site, "study": agreed.study.name, "rehearsed": True} | _document(result))
    else:
        out.print(
            f"{file.site}: on synthetic patients, every integer is what the ledger says was paid for", highlight=False
        )
        out.print(result.report, highlight=False)
    _refuse(result)


def _document(result: AuditResult) -> dict[str, Any]:
    return {
        "passed": result.passed,
        "claimed_epsilon": result.claimed_epsilon,
        "delta": result.delta,
        "lower_bound": result.lower_bound,
        "canaries": result.canaries,
        "guesses": result.guesses,
        "correct": result.correct,
        "confidence": result.confidence,
        "report": result.report,
    }


def _refuse(result: AuditResult) -> None:
    from secure_fed.core.errors import AuditFailedError

    if not result.passed:
        raise AuditFailedError(
            f"epsilon is at least {result.lower_bound:.2f}, more than the claimed {result.claimed_epsilon:g}; expected "
            "a claim that stands: do not train on patients with this build"
        )
