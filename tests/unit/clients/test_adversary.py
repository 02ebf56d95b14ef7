import math

import numpy as np
import torch

from secure_fed.clients.adversary import Discriminator
from secure_fed.model.adapters import build_adapter, initial_parameters
from secure_fed.protocol.study_tables import Method

torch.set_num_threads(1)

DIM, CLASSES = 5, 3


def unit(rows, seed):
    values = np.random.default_rng(seed).normal(size=(rows, DIM))
    return values / np.linalg.norm(values, axis=1, keepdims=True)


def odds_by_loops(batch, weights):
    """D(z) of every row z of a batch, layer by layer, with the batch's own mean and variance in each norm."""
    for linear, norm in (("first", True), ("second", True), ("last", False)):
        weight, bias = weights[f"{linear}_weight"], weights[f"{linear}_bias"]
        batch = [
            [sum(w * z for w, z in zip(row, one, strict=True)) + b for row, b in zip(weight, bias, strict=True)]
            for one in batch
        ]
        if norm:
            for place in range(len(bias)):
                column = [one[place] for one in batch]
                mean = sum(column) / len(column)
                spread = math.sqrt(sum((value - mean) ** 2 for value in column) / len(column) + 1e-5)
                scale, shift = weights[f"{linear}_scale"][place], weights[f"{linear}_shift"][place]
                for one in batch:
                    one[place] = max(0.0, (one[place] - mean) / spread * scale + shift)
    return [one[0] for one in batch]


def term_by_loops(source, target, weights):
    def mean_loss(batch, label):
        chances = [1 / (1 + math.exp(-value)) for value in odds_by_loops(batch, weights)]
        return -sum(math.log(p if label else 1 - p) for p in chances) / len(chances)

    return (mean_loss(source, 1) + mean_loss(target, 0)) / 2


def discriminator(seed=4):
    made = Discriminator(DIM, seed).double()
    rng = np.random.default_rng(9)
    with torch.no_grad():
        for name, value in made.named_parameters():
            if name.endswith(("scale", "shift")):
                value += torch.from_numpy(rng.normal(size=value.shape))
    return made


def numbers(made):
    return {name: value.detach().tolist() for name, value in made.named_parameters()}


def moved(batch, row, place, step):
    return [[z + step * (i == row and j == place) for j, z in enumerate(one)] for i, one in enumerate(batch)]


def test_the_term_is_the_papers_formula():
    made = discriminator()
    for m, n in ((4, 4), (6, 3), (2, 7)):
        source, target = unit(m, m), unit(n, 10 + n)
        found = made.domain_term(torch.from_numpy(source), torch.from_numpy(target)).item()
        assert abs(found - term_by_loops(source.tolist(), target.tolist(), numbers(made))) < 1e-10


def test_the_discriminator_descends_and_both_sides_of_features_ascend():
    made, source, target = discriminator(), unit(4, 1).tolist(), unit(3, 2).tolist()
    sides = [torch.tensor(side, dtype=torch.float64, requires_grad=True) for side in (source, target)]
    made.domain_term(*sides).backward()
    weights, step = numbers(made), 1e-6
    for side, batch in enumerate((source, target)):
        for row in range(len(batch)):
            for place in range(DIM):
                terms = []
                for sign in (1, -1):
                    sides_then = [source, target]
                    sides_then[side] = moved(batch, row, place, sign * step)
                    terms.append(term_by_loops(*sides_then, weights))
                slope = (terms[0] - terms[1]) / (2 * step)
                assert abs(sides[side].grad[row, place].item() + slope) < 1e-7  # reversed
    for name in ("first_weight", "second_weight", "second_shift", "last_weight", "first_scale"):
        gradient = dict(made.named_parameters())[name].grad.flatten()
        place = int(gradient.abs().argmax())
        terms = []
        for sign in (1, -1):
            value = np.array(weights[name])
            value.ravel()[place] += sign * step
            terms.append(term_by_loops(source, target, weights | {name: value.tolist()}))
        slope = (terms[0] - terms[1]) / (2 * step)
        assert abs(slope) > 1e-3
        assert abs(gradient[place].item() - slope) < 1e-7  # as it is


def test_the_gate_feels_the_unlabelled_images_too():
    method = Method(adaptation="adversarial")
    prompts = unit(CLASSES, 3).astype(np.float32)
    adapter = build_adapter(method, prompts, 20.0, initial_parameters(method, DIM, prompts, 0))
    adapted = adapter.adapt(torch.from_numpy(unit(4, 1)).float())
    Discriminator(DIM, 0).domain_term(adapted.detach(), adapter.adapt(torch.from_numpy(unit(4, 2)).float())).backward()
    assert adapter.second_weight.grad.abs().max() > 0


def test_it_starts_from_its_seed_alone():
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = numbers(Discriminator(DIM, 7))
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert first == numbers(Discriminator(DIM, 7))
    assert first != numbers(Discriminator(DIM, 8))
    bound = 1 / math.sqrt(DIM)
    assert all(abs(value) <= bound for row in first["first_weight"] for value in row)


def test_it_has_the_papers_size():
    assert sum(value.numel() for value in Discriminator(512, 0).parameters()) == 527_873
