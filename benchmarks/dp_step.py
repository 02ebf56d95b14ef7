"""One full-batch step with and without differential privacy: facmic adapter, D = 512, 1,000 patients of one image.

    python benchmarks/dp_step.py [--threads 2] [--repeats 15]

The private step clips, noises and steps, all in float64; the plain one is float32 with Adam, as a site trains without
a budget. The two alternate, so that other load on the machine meets both. Goal 3, limit 4 times; at most 2 GiB.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import time

import numpy as np
import torch

from secure_fed.model.adapters import build_adapter, class_prompt_loss, initial_parameters
from secure_fed.privacy.dp_training import Descent, PatientBatch, class_prompt_patient_loss, public_log_prior, to_double
from secure_fed.protocol.study_tables import Method, PrivateTraining

DIM, CLASSES, PATIENTS = 512, 4, 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=15)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    rng = np.random.default_rng(0)
    prompts = torch.nn.functional.normalize(torch.from_numpy(rng.normal(size=(CLASSES, DIM))).float(), dim=1).numpy()
    features = torch.nn.functional.normalize(torch.from_numpy(rng.normal(size=(PATIENTS, DIM))).float(), dim=1)
    labels = torch.from_numpy(rng.integers(0, CLASSES, PATIENTS))
    method = Method()
    start = initial_parameters(method, DIM, prompts, 0)

    plain = build_adapter(method, prompts, 100.0, start)
    optimizer = torch.optim.Adam(plain.shared_parameters().values(), lr=1e-3, fused=True)
    log_prior = torch.full((CLASSES,), -np.log(CLASSES))

    def plain_step() -> None:
        loss = class_prompt_loss(plain.logits(features), labels, log_prior).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    private = to_double(build_adapter(method, prompts, 100.0, start))
    batch = PatientBatch(features.double()[:, None], labels[:, None], torch.ones(PATIENTS, 1, dtype=torch.bool))
    descent = Descent(PrivateTraining(steps=1), 8.0, PATIENTS)
    private_loss = class_prompt_patient_loss(public_log_prior(PrivateTraining(), CLASSES))

    def private_step() -> None:
        descent.run(private, batch, private_loss)

    seconds: dict[str, list[float]] = {"plain": [], "private": []}
    cpu = dict.fromkeys(seconds, 0.0)
    for repeat in range(arguments.repeats + 2):
        for name, step in (("plain", plain_step), ("private", private_step)):
            begun, used = time.perf_counter(), time.process_time()
            step()
            if repeat >= 2:  # the first ones warm up
                seconds[name].append(time.perf_counter() - begun)
                cpu[name] += time.process_time() - used
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    for name, values in seconds.items():
        print(f"{name:8} {1000 * medians[name]:7.1f} ms (fastest {1000 * min(values):.1f})")
    print(
        f"ratio {medians['private'] / medians['plain']:.2f} of medians, "
        f"{min(seconds['private']) / min(seconds['plain']):.2f} of the fastest, "
        f"{cpu['private'] / cpu['plain']:.2f} of processor time; peak memory {memory:.2f} GiB"
    )


if __name__ == "__main__":
    main()
