"""Balanced accuracy under differential privacy: methods by budget, on phantoms and on brain MRI.

    python benchmarks/dp_utility.py WORK [--brain-mri DIR] [--methods ...] [--seeds 5] [--epsilons 1 3 8]

Features come from the committed mini-CLIP, cached in WORK. Three sites train together by federated averaging of what
Site sends, without encryption (which changes no bit) and without the rounding to integers. Noise is planned as Site
plans it, one round kept for a crash. Prints a table of means and standard errors over seeds of initial adapter and
noise, and one JSON line a cell.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from clients.features import SiteFeatures
from clients.site import training_seed
from clients.training import predict, train_round, zero_shot
from privacy.dp_training import (
    Descent,
    class_prompt_patient_loss,
    gather_patients,
    public_log_prior,
    to_double,
)
from privacy.gaussian import plan_noise
from secure_fed.adapters import build_adapter, initial_parameters
from secure_fed.evaluation import metrics
from secure_fed.phantoms import CLASSES
from secure_fed.simulation import open_sites, prepare
from secure_fed.study import AgreedStudy, Method, PrivateTraining, Study, read_study
from secure_fed.tomlfile import parse_table

DELTA = 1e-5
METHODS = ("text_head", "low_rank", "facmic")
PATIENTS = 1000
"""A phantom site's patients; 600 of them train."""

PROMPTS = {
    "no tumour": ["an MRI scan of a healthy brain", "brain MRI without a tumour"],
    "glioma": ["an MRI scan of a brain with a glioma", "brain MRI showing an irregular glioma"],
    "meningioma": ["an MRI scan of a brain with a meningioma", "brain MRI showing a smooth meningioma"],
    "pituitary tumour": ["an MRI scan of a brain with a pituitary tumour", "brain MRI showing a pituitary tumour"],
}


def phantom_template() -> Study:
    names = ["north", "east", "south"]
    table = {
        "format": 1,
        "name": "dp-utility",
        "mode": "plain",
        "seed": 0,
        "rounds": 10,
        "max_sites": 4,
        "min_sites": 3,
        "key_maker": "north",
        "classes": [{"name": name, "prompts": PROMPTS[name]} for name in CLASSES],
        "backbone": {"model": "mini-clip", "weights": "file", "file": "mini-clip.safetensors"},
        "method": {"adapter": "facmic"},
        "training": {"steps": 50, "learning_rate": 1e-3},
        "encoding": {"bits": 16, "lanes": 2, "value_bound": 0.1},
        "sites": [{"name": name} for name in names],
        "simulation": {
            "kind": "simulated",
            "unit": "patient",
            "sites": [{"name": name, "folder": name} for name in names],
            "phantoms": [
                {"name": name, "patients": PATIENTS, "scanner": index, "class_mix": [0.25] * 4, "unlabelled": 0.0}
                for index, name in enumerate(names)
            ],
            "phantom_seed": 11,
        },
    }
    return parse_table(table, Study, SystemExit, "template")  # type: ignore[type-var]


def brain_template() -> Study:
    table = read_study(Path("brain_mri")).model_dump(mode="json", exclude_none=True)
    table["mode"] = "plain"
    table["backbone"] = {"model": "mini-clip", "weights": "file", "file": "mini-clip.safetensors"}
    return parse_table(table, Study, SystemExit, "template")  # type: ignore[type-var]


def load(template: Study, out: Path, data: Path | None) -> tuple[AgreedStudy, list[SiteFeatures]]:
    agreed = prepare(template, out, data)
    sites = open_sites(agreed, out)
    return agreed, [site.features() for site in sites if agreed.study.site(site.name).role == "train"]


def federate(
    agreed: AgreedStudy, features: list[SiteFeatures], method: Method, epsilon: float | None, seed: int
) -> float:
    """Mean balanced accuracy over the sites' test images, after all rounds."""
    initial = agreed.initial
    study = agreed.study.model_copy(update={"method": method})
    start = initial_parameters(method, initial.prompt_features.shape[1], initial.prompt_features, seed)
    own = AgreedStudy(study, replace(initial, adapter=start))
    parameters: dict[str, Any] = dict(start)
    for round_number in range(1, study.rounds + 1):
        local = []
        for index, one in enumerate(features):
            if epsilon is None:
                local.append(train_round(own, parameters, one, training_seed(seed, str(index), round_number)))
            else:
                local.append(private_round(own, parameters, one, epsilon))
        parameters = {name: np.mean([result[name] for result in local], axis=0) for name in parameters}
    return test(own, parameters, features)


def test(agreed: AgreedStudy, parameters: dict[str, Any] | None, features: list[SiteFeatures]) -> float:
    scores = []
    for one in features:
        probabilities = (
            zero_shot(agreed, one.test.x) if parameters is None else predict(agreed, parameters, one.test.x, None)
        )
        scores.append(metrics(probabilities, one.test.y)["balanced_accuracy"])
    return float(np.mean([score for score in scores if score is not None]))


def private_round(
    agreed: AgreedStudy, parameters: dict[str, Any], features: SiteFeatures, epsilon: float
) -> dict[str, Any]:
    constants, initial = agreed.study.privacy, agreed.initial
    owners = features.patients["train"]
    batch = gather_patients(features.train.x, features.train.y, owners, constants.images_per_patient)
    noise = plan_noise([], epsilon, DELTA, constants.steps * (agreed.study.rounds + 1))
    assert noise is not None
    adapter = to_double(build_adapter(agreed.study.method, initial.prompt_features, initial.logit_scale, parameters))
    loss = class_prompt_patient_loss(public_log_prior(constants, len(agreed.study.classes)))
    Descent(constants, noise * constants.clip, round(len(batch.mask), -1)).run(adapter, batch, loss)
    return {name: value.detach().numpy().copy() for name, value in adapter.shared_parameters().items()}


def with_privacy(agreed: AgreedStudy, constants: PrivateTraining) -> AgreedStudy:
    return AgreedStudy(agreed.study.model_copy(update={"privacy": constants}), agreed.initial)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--brain-mri", type=Path)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--methods", nargs="*", choices=METHODS, default=METHODS)
    parser.add_argument("--epsilons", type=float, nargs="*", default=[1.0, 3.0, 8.0])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    data: list[tuple[str, Study, Path | None]] = [("phantoms", phantom_template(), None)]
    if arguments.brain_mri:
        data.append(("brain_mri", brain_template(), arguments.brain_mri))
    for name, template, folder in data:
        agreed, features = load(template, arguments.work / name, folder)
        counts = [len(set(one.patients["train"])) for one in features]
        print(f"\n{name}: training patients {counts}, zero-shot {100 * test(agreed, None, features):.1f}")
        print(
            f"{'method':10}" + "".join(f"{'eps ' + format(e, 'g'):>16}" for e in arguments.epsilons) + f"{'none':>16}"
        )
        for kind in arguments.methods:
            method = Method.model_validate({"adapter": kind})
            row = f"{kind:10}"
            for epsilon in (*arguments.epsilons, None):
                scores = [100 * federate(agreed, features, method, epsilon, seed) for seed in range(arguments.seeds)]
                mean, error = float(np.mean(scores)), float(np.std(scores, ddof=1) / np.sqrt(len(scores)))
                row += f"{mean:10.1f} ± {error:.1f}"
                cell = {"data": name, "method": kind, "epsilon": epsilon, "scores": [round(s, 2) for s in scores]}
                print(json.dumps(cell), flush=True)
            print(row, flush=True)


if __name__ == "__main__":
    main()
