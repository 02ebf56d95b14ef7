"""Folders to report on, made by hand: numbers that look like results, and that a test can compute again."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np

CLASSES = ("no tumour", "glioma", "meningioma", "pituitary tumour")
SITES = ("north", "east", "south", "west")
EPSILONS = (1.0, 3.0, 8.0, None)
METHODS = ("text_head", "low_rank", "facmic")
VALUES = {"text_head": 2048, "low_rank": 16_448, "facmic": 525_312}


def scores(rng: np.random.Generator, recall: list[float], images: int) -> dict[str, Any]:
    """Metrics of a confusion matrix with about these recalls."""
    size = images // len(recall)
    matrix = []
    for true, share in enumerate(recall):
        right = int(rng.binomial(size, min(max(share, 0.0), 1.0)))
        others = rng.multinomial(size - right, [1 / (len(recall) - 1)] * (len(recall) - 1)).tolist()
        matrix.append([*others[:true], right, *others[true:]])
    found = [row[true] / sum(row) for true, row in enumerate(matrix)]
    balanced = sum(found) / len(found)
    return {
        "balanced_accuracy": balanced,
        "accuracy": sum(row[true] for true, row in enumerate(matrix)) / (size * len(recall)),
        "macro_f1": balanced - 0.01,
        "auroc": min(1.0, 0.5 + 0.55 * balanced),
        "sensitivity_at_95_specificity": balanced - 0.1,
        "expected_calibration_error": 0.05,
        "confusion_matrix": matrix,
        "intervals": {"balanced_accuracy": [balanced - 0.06, min(1.0, balanced + 0.05)]},
        "images": size * len(recall),
        "patients": size * 2,
    }


def summary(method: str, epsilon: float | None, seed: int, **changes: Any) -> dict[str, Any]:
    """A ``summary.json``; privacy costs the last class of each site most."""
    rng = np.random.default_rng([METHODS.index(method), 0 if epsilon is None else int(10 * epsilon), seed])
    cost = 0.0 if epsilon is None else {"text_head": 0.05, "low_rank": 0.12, "facmic": 0.25}[method] / epsilon
    level = {"text_head": 0.87, "low_rank": 0.86, "facmic": 0.89}[method]

    def result(base: float, paid: float, rng: np.random.Generator = rng) -> dict[str, Any]:
        recall = [base, base - 0.3 * paid, base - 0.5 * paid, base - 2.2 * paid]
        per_site = {
            site: scores(rng, [share - 0.02 * index for share in recall], 160) for index, site in enumerate(SITES)
        }
        return {"per_site": per_site, "held_out": scores(rng, [share - 0.06 for share in recall], 480)}

    def alone(base: float) -> dict[str, Any]:
        found = result(base, 0.0)
        return found | {"held_out_per_site": dict.fromkeys(SITES, found["held_out"])}

    values = VALUES[method]
    rounds = [
        {
            "round": number,
            "sites_in": 4,
            "bytes_up": 4 * (int(values * 2.27) + 2000),
            "bytes_down": 5 * (int(values * 2.28) + 4000),
            "seconds": round(0.9 + 0.1 * float(rng.random()), 3),
            "validation": None
            if epsilon is not None
            else level - 0.3 * math.exp(-0.6 * number) + 0.01 * float(rng.random()),
            "val_balanced_accuracy": {
                site: level - cost - 0.3 * math.exp(-0.6 * number) + 0.01 * float(rng.random()) for site in SITES
            },
        }
        for number in range(1, 11)
    ]
    made = {
        "kind": "study",
        "format": 2,
        "study_id": "ab" * 32,
        "backbone": {"model": "mini-clip", "digest": "2c" * 32},
        "method": method,
        "device": dict.fromkeys((*SITES, "observer"), "cpu"),
        "mode": "he",
        "seed": seed,
        "sites": list(SITES),
        "observers": ["observer"],
        "values": values,
        "adapter_digest": "cd" * 32,
        "rounds": rounds,
        "metrics": {
            "zero_shot": result(0.7, 0.0, np.random.default_rng(seed)),  # what is chosen changes nothing of it
            "local_only": alone(0.74),
            "text_head": alone(0.82),
            "pooled": result(0.9, 0.0),
            "federated": result(level, cost),
        },
        "seconds_total": 20.0 + seed,
    }
    if epsilon is not None:
        made["privacy"] = {
            site: {
                "epsilon_spent": 0.95 * epsilon,
                "epsilon_budget": epsilon,
                "delta": 1e-5,
                "unit": "patient",
                "simulated": True,
            }
            for site in SITES
        }
    return made | changes


def make_sweep(
    folder: Path,
    *,
    methods: tuple[str, ...] = METHODS,
    epsilons: tuple[float | None, ...] = EPSILONS,
    seeds: int = 3,
    name: str = "privacy-utility",
    failed: int = 0,
) -> list[dict[str, Any]]:
    """A sweep over methods, epsilons and seeds; its lines. The first ``failed`` trials have failed."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for number, (method, epsilon, seed) in enumerate(
        (method, epsilon, seed) for method in methods for epsilon in epsilons for seed in range(seeds)
    ):
        settings = {"method.adapter": method, "rounds": 10, "seed": seed, "epsilon": epsilon}
        done = number >= failed
        lines.append(
            {
                "trial": f"{number:016x}",
                "settings": settings,
                "status": "done" if done else "failed",
                "error": None if done else "no space left <on> device",
                "summary": summary(method, epsilon, seed) if done else None,
                "seconds": 21.5 + number,
                "code": "ef" * 32,
                "finished": "2026-01-01T00:00:00+00:00",
            }
        )
    facts = {
        "format": 1,
        "name": name,
        "title": "Accuracy against epsilon, by method",
        "study": "demo",
        "study_id": "ab" * 32,
        "data": None,
        "data_kind": "simulated",
        "unit": "patient",
        "axes": {"method.adapter": list(methods), "epsilon": list(epsilons)},
        "fixed": {"rounds": 10},
        "seeds": list(range(seeds)),
        "facts": {
            "mode": "he",
            "rounds": 10,
            "sites": list(SITES),
            "observers": ["observer"],
            "classes": list(CLASSES),
            "backbone": "mini-clip",
            "method": {"adapter": "facmic", "norm": "layer"},
            "min_sites": 3,
            "bits": 11,
            "lanes": 3,
            "delta": 1e-5,
        },
        "trials": [{"trial": line["trial"], "settings": line["settings"]} for line in lines],
        "code": "ef" * 32,
        "versions": {"python": "3.12"},
        "command": "secfacmic sweep privacy_utility --out pu",
        "caveat": "for choosing on public or simulated data",
    }
    (folder / "sweep.json").write_text(json.dumps(facts))
    (folder / "trials.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return lines


def make_attack(folder: Path) -> dict[str, Any]:
    """An ``attack.json`` with all four views."""

    def roc(strength: float) -> list[list[float]]:
        return [[x, x ** (1 / (1 + strength))] for x in np.linspace(0, 1, 41).tolist()]

    def view(name: str, epsilon: float | None, hits: float, strength: float) -> dict[str, Any]:
        auc = (1 + strength) / (2 + strength)
        return {
            "view": name,
            "epsilon": epsilon,
            "inversion": {"hit_rate": hits, "interval": [hits - 0.06, hits + 0.06], "chance": 0.04, "n": 120},
            "membership": {
                "auc": auc,
                "auc_interval": [auc - 0.03, auc + 0.03],
                "tpr_at_1_fpr": 0.01 + 0.1 * strength,
                "roc": roc(strength),
                "n": 400,
            },
        }

    content = {
        "format": 1,
        "study": "demo",
        "study_id": "ab" * 32,
        "data_kind": "simulated",
        "delta": 1e-5,
        "shadows": 16,
        "notes": [],
        "caveat": "Attacks on public or simulated data, by the attacker described.",
        "views": [
            view("plain_update", None, 0.61, 2.0),
            view("server_he", None, 0.042, 0.01),
            view("released", None, 0.11, 0.6),
            view("released_dp", 3.0, 0.05, 0.08),
        ],
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "attack.json").write_text(json.dumps(content))
    return content
