import numpy as np
import pytest
import torch

from secure_fed.clients import training as module
from secure_fed.clients.adversary import Discriminator
from secure_fed.clients.features import Labelled, SiteFeatures
from secure_fed.clients.training import predict, train_alone, train_round, training_seed, zero_shot
from secure_fed.core.errors import DataError
from secure_fed.model.adapters import PRIVATE_HEAD, build_adapter, class_prompt_loss, initial_parameters
from secure_fed.model.evaluation import metrics
from secure_fed.protocol import aggregation, codec
from secure_fed.protocol.initial_state import InitialState
from secure_fed.protocol.study import AgreedStudy, Study
from secure_fed.protocol.study_tables import Aggregation, Method, Training

torch.set_num_threads(1)

DIM, CLASSES, SCALE = 32, 4, 20.0
METHODS = {
    "facmic": Method(lmmd_weight=1.0),
    "facmic without LMMD": Method(),
    "batch": Method(norm="batch", lmmd_weight=1.0),
    "contrastive": Method(loss="contrastive", lmmd_weight=1.0),
    "low_rank": Method(adapter="low_rank", rank=4),
    "text_head": Method(adapter="text_head"),
    "text_head contrastive": Method(adapter="text_head", loss="contrastive"),
    "fedclip": Method(adapter="fedclip"),
    "private head": Method(private_head=True),
    "adversarial": Method(adaptation="adversarial"),
    "FAA-CLIP": Method(norm="batch", loss="contrastive", adaptation="adversarial"),
}


def unit(values):
    return (values / np.linalg.norm(values, axis=1, keepdims=True)).astype(np.float32)


def clusters(labels, seed=0):
    centres = np.random.default_rng(42).normal(size=(CLASSES, DIM))
    noise = np.random.default_rng(seed).normal(size=(len(labels), DIM))
    return unit(centres[labels] + 0.8 * noise)


def features(train=80, unlabelled=50, classes=range(CLASSES), seed=0):
    rng = np.random.default_rng(seed)
    y, hidden = rng.choice(list(classes), train), rng.choice(list(classes), unlabelled)
    test = np.arange(200) % CLASSES
    held = Labelled(clusters(test, 1000), test)
    return SiteFeatures(Labelled(clusters(y, seed + 1), y), held, held, clusters(hidden, seed + 2), 0, 0)


def agreement(method, **settings):
    # Prompts that say little about the classes, as with a CLIP that has not seen such images.
    prompts = unit(
        np.random.default_rng(42).normal(size=(CLASSES, DIM)) + 2 * np.random.default_rng(7).normal(size=(CLASSES, DIM))
    )
    options = {"steps": 150, "learning_rate": 5e-3, "batch_size": 16} | settings
    study = Study.model_construct(method=method, training=Training(**options), seed=3)
    return AgreedStudy(study, InitialState(initial_parameters(method, DIM, prompts, 3), prompts, SCALE))


def same(first, second):
    return list(first) == list(second) and all(np.array_equal(first[name], second[name]) for name in first)


def loss_of(agreed, parameters, site):
    p = predict(agreed, parameters, site.train.x, site.train.x)
    return -np.log(p[np.arange(len(p)), site.train.y]).mean()


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_training_learns(method):
    site, agreed = features(), agreement(method)
    start = agreed.initial.adapter
    trained = train_round(agreed, start, site, 1)
    assert list(trained) == sorted([*start, PRIVATE_HEAD] if method.private_head else start)
    assert all(trained[name].dtype == np.float64 and trained[name].shape == start[name].shape for name in start)
    assert loss_of(agreed, trained, site) < 0.6 * loss_of(agreed, start, site)
    accuracy = [
        metrics(predict(agreed, parameters, site.test.x, site.train.x), site.test.y)["accuracy"]
        for parameters in (start, trained)
    ]
    assert accuracy[1] > accuracy[0] + 0.1
    assert accuracy[1] > 0.7


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_training_is_a_function_of_its_arguments(method):
    site, agreed = features(), agreement(method, steps=9)
    before = {name: value.copy() for name, value in agreed.initial.adapter.items()}
    torch.manual_seed(1)
    np.random.seed(1)
    states = torch.get_rng_state(), np.random.get_state()[1].copy()
    first = train_round(agreed, agreed.initial.adapter, site, 5)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert np.array_equal(np.random.get_state()[1], states[1])
    torch.manual_seed(2)
    assert same(first, train_round(agreed, agreed.initial.adapter, site, 5))
    assert not same(first, train_round(agreed, agreed.initial.adapter, site, 6))
    assert same(before, agreed.initial.adapter)


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
@pytest.mark.parametrize(
    ("train", "unlabelled", "classes"),
    [
        (80, 50, (0, 2, 3)),  # a class that the site lacks
        (80, 50, (1,)),
        (5, 3, range(CLASSES)),  # fewer images than a batch
        (1, 1, (2,)),
        (17, 33, range(CLASSES)),  # last batches of one
        (40, 0, range(CLASSES)),
    ],
)
def test_awkward_sites_train(method, train, unlabelled, classes):
    site, agreed = features(train, unlabelled, classes), agreement(method, steps=8)
    trained = train_round(agreed, agreed.initial.adapter, site, 1)
    assert all(np.isfinite(value).all() for value in trained.values())
    assert np.isfinite(predict(agreed, trained, site.test.x, site.train.x)).all()


def test_the_absent_class_is_not_pushed_down():
    # Logit adjustment: a site that lacks a class must not teach the others to forget it.
    agreed = agreement(Method(adapter="text_head"))
    trained = train_round(agreed, agreed.initial.adapter, features(classes=(0, 1, 3)), 1)
    assert np.array_equal(trained["offsets"][2], np.zeros(DIM))
    assert (np.abs(trained["offsets"][[0, 1, 3]]).sum(axis=1) > 0).all()


def test_without_training_images_it_refuses():
    agreed = agreement(Method())
    with pytest.raises(DataError, match="no labelled training image"):
        train_round(agreed, agreed.initial.adapter, features(train=0), 1)


def test_each_pass_takes_every_image_once_and_ends_with_what_is_left():
    batches = module._batches(7, 3, np.random.default_rng(0))
    passes = [[next(batches) for _ in range(3)] for _ in range(4)]
    for taken in passes:
        assert [len(batch) for batch in taken] == [3, 3, 1]
        assert sorted(torch.cat(taken).tolist()) == list(range(7))
    assert len({tuple(torch.cat(taken).tolist()) for taken in passes}) > 1


def test_unlabelled_images_only_matter_with_lmmd_and_never_change_the_order():
    agreed = agreement(Method(), steps=5)
    few, many = features(unlabelled=2), features(unlabelled=40)
    start = agreed.initial.adapter
    assert same(train_round(agreed, start, few, 1), train_round(agreed, start, many, 1))
    aligned = agreement(Method(lmmd_weight=1.0), steps=5)
    none = features(unlabelled=0)
    assert same(train_round(aligned, start, none, 1), train_round(agreed, start, none, 1))
    assert not same(train_round(aligned, start, many, 1), train_round(agreed, start, many, 1))


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_optimizer_is_torchs_with_l2_in_the_gradient(optimizer):
    settings = {
        "steps": 3,
        "learning_rate": 0.01,
        "batch_size": 1000,
        "optimizer": optimizer,
        "weight_decay": 0.02,
        "betas": (0.9, 0.98),
        "epsilon": 1e-6,
        "momentum": 0.8,
    }
    agreed, site = agreement(Method(), **settings), features(train=20)
    found = train_round(agreed, agreed.initial.adapter, site, 1)
    initial = agreed.initial
    adapter = build_adapter(Method(), initial.prompt_features, SCALE, initial.adapter).double()
    adapter.prompts = adapter.prompts.double()
    values = list(adapter.shared_parameters().values())
    moments = [(torch.zeros_like(v), torch.zeros_like(v)) for v in values]
    x, y = torch.from_numpy(site.train.x).double(), torch.from_numpy(site.train.y)
    prior = torch.log(torch.bincount(y, minlength=CLASSES) / len(y))
    for step in range(1, 4):
        loss = torch.nn.functional.cross_entropy(adapter.logits(x) + prior, y)
        gradients = torch.autograd.grad(loss, values)
        with torch.no_grad():
            for value, gradient, (first, second) in zip(values, gradients, moments, strict=True):
                gradient = gradient + 0.02 * value
                if optimizer == "sgd":
                    first.copy_(0.8 * first + gradient)
                    value -= 0.01 * first
                else:
                    first.copy_(0.9 * first + 0.1 * gradient)
                    second.copy_(0.98 * second + 0.02 * gradient**2)
                    corrected = (second / (1 - 0.98**step)).sqrt() + 1e-6
                    value -= 0.01 * first / (1 - 0.9**step) / corrected
    for name, value in adapter.shared_parameters().items():
        np.testing.assert_allclose(found[name], value.detach().numpy(), atol=2e-5)


def test_adversarial_training_is_one_descent_of_gate_and_discriminator():
    # FAA-CLIP: gate and discriminator share an optimiser; the reversed gradient is what sets them against each other.
    rate, weight = 0.05, 0.7
    settings = {"steps": 3, "learning_rate": rate, "batch_size": 1000, "optimizer": "sgd", "momentum": 0.0}
    method = Method(adaptation="adversarial", adversarial_weight=weight)
    agreed, site = agreement(method, **settings), features(train=20, unlabelled=12)
    found = train_round(agreed, agreed.initial.adapter, site, 5)
    adapter = build_adapter(method, agreed.initial.prompt_features, SCALE, agreed.initial.adapter)
    judge = Discriminator(DIM, 5)
    gate, judged = list(adapter.shared_parameters().values()), list(judge.parameters())
    # Batch norm adds rows up in their order.
    x, y, target = torch.from_numpy(site.train.x), torch.from_numpy(site.train.y), torch.from_numpy(site.unlabelled)
    prior = torch.log(torch.bincount(y, minlength=CLASSES) / len(y))
    ones, zeros = torch.ones(len(x)), torch.zeros(len(target))
    entropy = torch.nn.functional.binary_cross_entropy_with_logits
    for _ in range(3):
        adapted = adapter.adapt(x)
        told = (entropy(judge(adapted), ones) + entropy(judge(adapter.adapt(target)), zeros)) / 2
        label = class_prompt_loss(adapter.compare(adapted), y, prior).mean()
        down = torch.autograd.grad(label - weight * told, gate, retain_graph=True)
        theirs = torch.autograd.grad(weight * told, judged)
        with torch.no_grad():
            for value, gradient in zip([*gate, *judged], [*down, *theirs], strict=True):
                value -= rate * gradient
    for name, value in adapter.shared_parameters().items():
        np.testing.assert_allclose(found[name], value.detach().numpy(), atol=2e-5)
    assert not same(found, train_round(agreement(Method(), **settings), agreed.initial.adapter, site, 5))


def test_values_that_do_not_move_come_back_exactly():
    # 1/3 is no float32: without care its rounding would be sent as an update.
    agreed = agreement(Method(adapter="text_head"), steps=3)
    start = {"offsets": np.full((CLASSES, DIM), 1 / 3)}
    trained = train_round(agreed, start, features(classes=(0, 1)), 1)
    assert np.array_equal(trained["offsets"][2:], start["offsets"][2:])


def test_zero_shot_is_the_softmax_of_scaled_cosines():
    agreed, site = agreement(Method()), features()
    logits = SCALE * site.test.x @ agreed.initial.prompt_features.T
    expected = torch.softmax(torch.from_numpy(logits), dim=1).numpy()
    found = zero_shot(agreed, site.test.x)
    assert found.dtype == np.float64
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert zero_shot(agreed, site.test.x[:0]).shape == (0, CLASSES)


def test_probabilities_of_a_row_do_not_depend_on_the_others():
    agreed, site = agreement(Method(norm="batch"), steps=5), features()
    trained = train_round(agreed, agreed.initial.adapter, site, 1)
    every = predict(agreed, trained, site.test.x, site.train.x)
    one = predict(agreed, trained, site.test.x[3:4], site.train.x)
    np.testing.assert_allclose(one[0], every[3], atol=1e-5)
    np.testing.assert_allclose(every.sum(axis=1), 1)


def test_prox_pulls_towards_the_global_adapter():
    # FedProx, eq. 2: with full batches and plain SGD each step is -lr (gradient + mu (w - w_global)).
    mu, rate = 3.0, 0.05
    settings = {"steps": 4, "learning_rate": rate, "batch_size": 1000, "optimizer": "sgd", "momentum": 0.0}
    agreed, site = agreement(Method(adapter="text_head"), **settings, prox=mu), features(train=20)
    start = {"offsets": np.random.default_rng(8).normal(size=(CLASSES, DIM))}
    found = train_round(agreed, start, site, 1)["offsets"]
    adapter = build_adapter(agreed.study.method, agreed.initial.prompt_features, SCALE, start)
    x, y = torch.from_numpy(site.train.x), torch.from_numpy(site.train.y)
    prior = torch.log(torch.bincount(y, minlength=CLASSES) / len(y))
    value = adapter.shared_parameters()["offsets"]
    centre = value.detach().clone()
    for _ in range(4):
        (gradient,) = torch.autograd.grad(class_prompt_loss(adapter.logits(x), y, prior).mean(), [value])
        with torch.no_grad():
            value -= rate * (gradient + mu * (value - centre))
    np.testing.assert_allclose(found, value.detach().numpy(), atol=1e-5)
    free = train_round(agreement(agreed.study.method, **settings), start, site, 1)["offsets"]
    assert np.linalg.norm(found - start["offsets"]) < 0.8 * np.linalg.norm(free - start["offsets"])


def test_prox_learns():
    site, agreed = features(), agreement(Method(), prox=0.1)
    trained = train_round(agreed, agreed.initial.adapter, site, 1)
    assert loss_of(agreed, trained, site) < 0.6 * loss_of(agreed, agreed.initial.adapter, site)


def test_a_private_head_goes_on_from_where_it_was_and_serves_its_own_site():
    agreed, site = agreement(Method(private_head=True), steps=20), features()
    first = train_round(agreed, agreed.initial.adapter, site, 1)
    assert np.abs(first[PRIVATE_HEAD]).max() > 0
    shared = {name: value for name, value in first.items() if name != PRIVATE_HEAD}
    assert not same(train_round(agreed, first, site, 2), train_round(agreed, shared, site, 2))
    # Other prompts' confusion is what the head corrects: it must fit its site better than what is shared.
    assert loss_of(agreed, first, site) < loss_of(agreed, shared, site)


@pytest.mark.parametrize("rule", ["average", "fedavgm", "fedadam"])
def test_alone_is_a_federation_of_one(rule):
    agreed = agreement(Method(adapter="low_rank", rank=2), steps=4)
    chosen = Aggregation(rule=rule, learning_rate=1.0 if rule == "average" else 0.1)
    agreed = AgreedStudy(agreed.study.model_copy(update={"rounds": 3, "aggregation": chosen}), agreed.initial)
    site = features()
    found = train_alone(agreed, site, "oak")
    state = aggregation.initial_state(chosen, agreed.initial.adapter)
    for number in (1, 2, 3):
        adapter = aggregation.adapter_of(state)
        trained = train_round(agreed, adapter, site, training_seed(3, "", "oak", number))
        state = aggregation.apply(chosen, state, codec.flatten(trained) - codec.flatten(adapter))
    assert same(found, aggregation.adapter_of(state))
    assert not same(found, train_alone(agreed, site, "elm"))
