"""``secfacmic audit``: try to refute what private training claims, on synthetic patients."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from secure_fed.cli.output import Json, out, print_json


def audit(
    epsilon: Annotated[float, typer.Option(min=0.01, max=100, help="The claim to refute.")] = 3.0,
    delta: Annotated[float, typer.Option(min=1e-12, max=1e-3, help="The claim's delta.")] = 1e-5,
    study: Annotated[
        Path | None, typer.Option(help="A study whose [privacy] constants to train with; else the defaults.")
    ] = None,
    canaries: Annotated[int, typer.Option(min=10, max=100_000, help="Canaries, m.")] = 1000,
    guesses: Annotated[int, typer.Option(min=2, help="Guesses, r; fix it before you look.")] = 100,
    json_: Json = False,
) -> None:
    """Audit this machine's private training in one run, and attack it, on synthetic patients.

    No patient's data are read and no budget is spent.
    """
    import torch

    from secure_fed.core.errors import AuditFailedError
    from secure_fed.privacy.attacks import attack_with_and_without
    from secure_fed.privacy.audit import audit as run
    from secure_fed.protocol.study import PrivateTraining, read_study_file

    torch.set_num_threads(1)  # on arrays so small, more threads mostly wait for each other
    settings = PrivateTraining() if study is None else read_study_file(study).privacy
    result = run(epsilon, delta, settings, canaries=canaries, guesses=min(guesses, canaries))
    private, plain = attack_with_and_without(epsilon, delta)
    if json_:
        rates = {"false_positive_rate": private.false_positive_rate, "shadows": private.shadows}
        print_json(
            {
                "passed": result.passed,
                "claimed_epsilon": epsilon,
                "delta": delta,
                "lower_bound": result.lower_bound,
                "canaries": result.canaries,
                "guesses": result.guesses,
                "correct": result.correct,
                "confidence": result.confidence,
                "report": result.report,
                "attack": {
                    "with": {"true_positive_rate": private.true_positive_rate, "auc": private.auc, **rates},
                    "without": {"true_positive_rate": plain.true_positive_rate, "auc": plain.auc, **rates},
                },
            }
        )
    else:
        out.print(result.report, highlight=False)
        out.print(
            f"LiRA with {private.shadows} shadow models on {private.patients} synthetic patients learnt by heart: true "
            f"positive rate {100 * private.true_positive_rate:.1f} % at {100 * private.false_positive_rate:g} % false "
            f"positives (without privacy {100 * plain.true_positive_rate:.1f} %). An attack, not a bound.",
            highlight=False,
        )
    if not result.passed:
        raise AuditFailedError(
            f"epsilon is at least {result.lower_bound:.2f}, more than the claimed {epsilon:g}; expected a claim that "
            "stands: do not train on patients with this build"
        )
