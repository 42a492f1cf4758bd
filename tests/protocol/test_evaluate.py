"""Streamed evaluation against a plain timm model that stands in memory as a whole.

The same global model, of made-up weights, is evaluated on 1, 2 and 4 ranks in many ways (once, in the fixture
`runs`); the tests compare what came out.
"""

import functools
import math
from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from resist_ds.comm import Comm
from resist_ds.data.datasets import load_data
from resist_ds.data.images import InMemory
from resist_ds.engines.workers import Workers
from resist_ds.nets.blueprint import Blueprint
from resist_ds.nets.precision import autocast
from resist_ds.options.config import Config
from resist_ds.protocol.evaluate import Evaluation, moments
from resist_ds.protocol.partition import Layout, sample_partition
from resist_ds.trainer import Trainer
from tests import THREADS, oracle
from tests.conftest import run_ranks

PREACT = "preact_resnet_small"
BASIC = oracle.resist_test_basic.__name__  # post-activation, narrow
BOTTLENECK = oracle.resist_test_bottleneck.__name__
WORKERS, TESTS, CALIBRATION, BATCH = 5, 150, 90, 24
RANKS = (1, 2, 4)


pytestmark = [pytest.mark.usefixtures("fixed_threads"), pytest.mark.numerical]


@pytest.fixture(scope="module")
def alone():
    """A single rank, in this process."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
            patch.delenv(name, raising=False)
        yield Comm()


@functools.cache
def blueprint(model):
    plan = Blueprint(model, 10)
    for name in ("initial_shared", "initial_block"):  # timm's constructor takes most of such a small run
        setattr(plan, name, functools.cache(getattr(plan, name)))
    return plan


def options(**given):
    fixed = dict(dataset="synthetic", img_size=16, model=PREACT, mixed_precision="no", log_with="none")
    fixed |= dict(progress=False, cpu_threads=THREADS, batch_size=BATCH, calibration_samples=CALIBRATION)
    return Config(**fixed | given)


@functools.cache
def data_of(order="given", tests=TESTS):
    """The synthetic data set with fewer test images, in another order. Labels go 0, 1, … 9, 0, 1, …"""
    data = load_data(options())
    chosen = np.arange(tests)
    if order == "sorted":
        chosen = np.argsort(data.test.labels[chosen].numpy(), kind="stable")
    elif order == "shuffled":
        chosen = np.random.default_rng(0).permutation(tests)
    test = InMemory(data.test.images[chosen], data.test.labels[chosen])
    return replace(data, test=test), chosen


@functools.cache
def weights(model):
    """{timm name: value} of a whole global model in which every part does something, float32."""
    plan, values = blueprint(model), {}
    pieces = [("", plan.initial_shared(1))]
    pieces += [(plan.block_prefix(block), plan.initial_block(1, block)) for block in range(plan.pool)]
    generator = torch.Generator().manual_seed(2)
    for prefix, tensors in pieces:
        for name, value in tensors.items():
            if value.ndim == 1:  # norms, and the classifier's bias
                low, high = (-0.5, 0.5) if name.endswith("bias") else (0.5, 1.5)
                value = torch.empty_like(value).uniform_(low, high, generator=generator)
            if name in ("head.fc.weight", "fc.weight"):
                value = torch.empty_like(value).normal_(0, 0.1, generator=generator)
            values[prefix + name] = value
    return values


def placed(comm, config, deal):
    """The workers of this rank, holding those weights; what else they hold is NaN: it must not matter."""
    plan = blueprint(config.model)
    workers = Workers(comm, Layout(deal.workers, comm.size), plan, config, deal)
    values, layout = weights(config.model), workers.layout
    for worker, vector in workers.vectors.items():
        vector.fill_(torch.nan)
        for name, view in layout.shared.views(layout.shared_part(vector)).items():
            view.copy_(values[name])
        for slot, block in enumerate(deal.blocks[worker]):
            for name, view in layout.block.views(layout.slot_part(vector, slot)).items():
                view.copy_(values[plan.block_prefix(block) + name])
    return workers


@dataclass
class Found:
    """What one rank learnt of an evaluation: predictions and logits of its share, by image."""

    loss: float
    accuracy: float
    statistics: dict[str, tuple[np.ndarray, np.ndarray]]
    predictions: dict[int, int]
    logits: dict[int, np.ndarray]
    sent: int  # bytes


def evaluate(comm, config, *, order="given", tests=TESTS, workers=WORKERS, memory=None, transit=None):
    """One evaluation of the made-up global model on these ranks."""
    plan = blueprint(config.model)
    data, chosen = data_of(order, tests)
    deal = sample_partition(3, 0, workers=workers, pool=plan.pool, min_blocks=config.min_blocks)
    held = placed(comm, config, deal)
    evaluation = Evaluation(comm, Layout(workers, comm.size), plan, data, config)
    if memory is not None:  # bytes, where the options know only whole MiB
        evaluation.memory = memory
    if transit is not None:
        evaluation.transit = transit
    shown = held.for_evaluation(deal)
    before = {w: v.clone() for w, v in held.vectors.items()}
    seen = []
    last = held.subnet.module.get_submodule(plan.family.after[-1])
    hook = last.register_forward_hook(lambda _, __, logits: seen.append(logits.double()))
    sent = comm.ledger["eval"]
    precision = autocast(config, torch.device("cpu"))
    result = evaluation.run(shown, deal, deal.scale, precision, free=1 << 28)
    hook.remove()

    # Whatever happened, training goes on as if nothing had.
    assert all(torch.equal(v.nan_to_num(), before[w].nan_to_num()) for w, v in held.vectors.items())
    assert all(m.training and not m._forward_pre_hooks for m in held.subnet.module.modules())

    batches = range(0, tests, config.eval_batch_size or config.batch_size)
    mine = batches[comm.rank :: comm.size]  # what was seen before is the calibration
    seen = seen[len(seen) - len(mine) :]
    images = [chosen[i : i + len(x)] for i, x in zip(mine, seen, strict=True)]
    logits = {
        int(i): row.numpy()
        for part, x in zip(images, seen, strict=True)
        for i, row in zip(part, x, strict=True)
    }
    return Found(
        result.loss,
        result.accuracy,
        {name: (mean.numpy(), variance.numpy()) for name, (mean, variance) in result.statistics.items()},
        {i: int(row.argmax()) for i, row in logits.items()},
        logits,
        comm.ledger["eval"] - sent,
    )


SCENARIOS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    # name: (options, the rest). The first is what the others are compared with.
    "plain": ({}, {}),
    "sorted": ({}, dict(order="sorted")),
    "shuffled": ({}, dict(order="shuffled")),
    "one by one": (dict(eval_batch_size=7), {}),
    "all at once": (dict(eval_batch_size=TESTS), {}),  # so that most ranks have no test images
    "in chunks": ({}, dict(memory=1)),
    "in chunks of two": ({}, dict(memory=2 * BATCH * 8 * 1024)),
    "no prefetch": ({}, dict(transit=0)),
    "no prefetch, in chunks": ({}, dict(memory=1, transit=0)),
    "channels last": (dict(channels_last=True), {}),
    "few to calibrate": (dict(calibration_samples=40), {}),  # ranks 2 and 3 of 4 have none
    "one to calibrate": (dict(calibration_samples=1), {}),
    "bf16": (dict(mixed_precision="bf16"), {}),
    "bf16, no prefetch": (dict(mixed_precision="bf16"), dict(transit=0)),
    "basic": (dict(model=BASIC), {}),
    "basic, in chunks": (dict(model=BASIC), dict(memory=1)),
    "bottleneck": (dict(model=BOTTLENECK, min_blocks=4), {}),
}
EXACT = [  # the same numbers in the same batches, so the same bits
    ("plain", "in chunks"),
    ("plain", "in chunks of two"),
    ("plain", "no prefetch"),
    ("plain", "no prefetch, in chunks"),
    ("bf16", "bf16, no prefetch"),
    ("basic", "basic, in chunks"),
]
ALONE = {
    "in chunks of two",
    "no prefetch",
    "bf16, no prefetch",
    "basic, in chunks",
    "channels last",
}  # for speed
CLOSE = ["sorted", "shuffled", "one by one", "all at once", "channels last"]  # to "plain"


def everywhere(*scenarios, size):
    return size == 1 or not ALONE.intersection(scenarios)


def all_scenarios(comm):
    chosen = {name: s for name, s in SCENARIOS.items() if everywhere(name, size=comm.size)}
    return {name: evaluate(comm, options(**given), **rest) for name, (given, rest) in chosen.items()}


@pytest.fixture(scope="module")
def runs(alone, tmp_path_factory):
    """{R: [{scenario: Found} of every rank]}."""
    found = {1: [all_scenarios(alone)]}
    for size in RANKS[1:]:
        found[size] = run_ranks(all_scenarios, size, store=tmp_path_factory.mktemp("store") / "rendezvous")
    return found


def predictions(runs, size, scenario):
    """{test image: class}, of all ranks together."""
    found = {}
    for rank in runs[size]:
        assert not found.keys() & rank[scenario].predictions.keys(), "an image is tested once"
        found |= rank[scenario].predictions
    assert sorted(found) == list(range(TESTS))
    return found


def assert_same_statistics(one, two):
    assert one.keys() == two.keys()
    for name in one:
        np.testing.assert_array_equal(one[name][0], two[name][0], err_msg=name)
        np.testing.assert_array_equal(one[name][1], two[name][1], err_msg=name)


def off(logits, exact):
    """By how much, by the norm, of what distinguishes the images."""
    return np.linalg.norm(logits - exact) / np.linalg.norm(exact - exact.mean(0))


def assert_no_tie(logits):
    """Or the last bits of float32 would choose between two classes: then predictions need not agree."""
    second, first = np.sort(np.stack(logits), axis=1).T[-2:]
    assert (first - second).min() > 1e-5


# --- whatever the machine and the order


@pytest.mark.ranks
@pytest.mark.parametrize("scenario", [name for name in SCENARIOS if name not in ALONE])
def test_the_number_of_ranks_changes_no_bit(runs, scenario):
    first = runs[1][0][scenario]
    for size in RANKS:
        for rank in runs[size]:
            assert (rank[scenario].loss, rank[scenario].accuracy) == (first.loss, first.accuracy)
            assert_same_statistics(rank[scenario].statistics, first.statistics)
            assert all((x == first.logits[i]).all() for i, x in rank[scenario].logits.items())
        assert predictions(runs, size, scenario) == predictions(runs, 1, scenario)


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("size", "one", "other"), [(r, *pair) for r in RANKS for pair in EXACT if everywhere(*pair, size=r)]
)
def test_chunks_and_prefetching_change_no_bit(runs, size, one, other):
    for rank in runs[size]:
        assert (rank[other].loss, rank[other].accuracy) == (rank[one].loss, rank[one].accuracy)
        assert_same_statistics(rank[other].statistics, rank[one].statistics)
        assert all((x == rank[one].logits[i]).all() for i, x in rank[other].logits.items())


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("size", "scenario"), [(r, name) for r in RANKS for name in CLOSE if everywhere(name, size=r)]
)
def test_order_and_batch_size_change_no_prediction(runs, size, scenario):
    plain, found = runs[size][0]["plain"], runs[size][0][scenario]
    assert_no_tie([*plain.logits.values()])
    assert found.loss == pytest.approx(plain.loss, abs=1e-6)
    assert found.accuracy == plain.accuracy
    assert predictions(runs, size, scenario) == predictions(runs, size, "plain")
    for name, (mean, variance) in found.statistics.items():  # of training images, so not even touched
        exact = 0 if scenario != "channels last" else 1e-5
        np.testing.assert_allclose(mean, plain.statistics[name][0], rtol=exact, atol=exact)
        np.testing.assert_allclose(variance, plain.statistics[name][1], rtol=exact, atol=exact)


@pytest.mark.ranks
@pytest.mark.parametrize("size", RANKS)
def test_what_is_streamed_is_counted(runs, size):
    """Every pass over the pool costs each of its blocks once per other rank; statistics travel once."""
    plan = blueprint(PREACT)
    pool = plan.pool * 4 * sum(int(np.prod(shape)) for _, shape in plan.block)
    passes = math.ceil(math.ceil(TESTS / BATCH) / size)
    sent = {s: sum(rank[s].sent for rank in runs[size]) for s in ("plain", "in chunks")}
    assert (sent["plain"] > 0) == (size > 1)
    extra = sent["in chunks"] - sent["plain"]
    assert extra == pytest.approx((passes - 1) * (size - 1) * pool, rel=0.01)  # a vector is padded
    assert passes > 1 and (extra > 0) == (size > 1)


# --- against plain timm


def timm_net(model, dtype=torch.float64):
    net = oracle.plain_net(options(model=model), 10)
    net.load_state_dict(weights(model) | dict(net.named_buffers()), strict=True)
    return net.to(dtype)


def reference(model, scale, *, calibration=CALIBRATION, tests=TESTS, dtype=torch.float64):
    """(logits of the test images, statistics, loss) of a whole timm net in memory, in one batch each.

    Residual branches are scaled where they end, by hand. The calibration images go through once with batch
    statistics: each norm then uses the population mean and variance of what arrives there, layer by layer.
    """
    data, _ = data_of(tests=tests)
    net, plan = timm_net(model, dtype), blueprint(model)
    for block in range(plan.pool):
        module = net.get_submodule(plan.block_prefix(block).rstrip("."))
        end = {"PreActBasic": "conv2", "BasicBlock": "bn2", "Bottleneck": "bn3"}[type(module).__name__]
        module.get_submodule(end).register_forward_hook(lambda _, __, residual: scale * residual)
    statistics = {}

    def note(name, norm, x):
        values = x.double().transpose(0, 1).flatten(1)
        statistics[name] = values.mean(1), values.var(1, unbiased=False)

    norms = {n: m for n, m in net.named_modules() if isinstance(m, nn.BatchNorm2d)}
    hooks = [
        norm.register_forward_pre_hook(lambda norm, args, name=name: note(name, norm, args[0]))
        for name, norm in norms.items()
    ]
    convert = dict(device=torch.device("cpu"), dtype=dtype, channels_last=False)
    chosen = np.linspace(0, data.train_size - 1, calibration).round().astype(int)
    with torch.no_grad():
        net.train()(data.train_images(chosen, **convert))
        for hook in hooks:
            hook.remove()
        for name, norm in norms.items():
            norm.running_mean.copy_(statistics[name][0])
            norm.running_var.copy_(statistics[name][1])
        ((images, labels),) = data.test_batches([np.arange(tests)], **convert)
        logits = net.eval()(images)
    return (
        logits,
        statistics,
        F.cross_entropy(logits, labels).item(),
        (logits.argmax(1) == labels).double().mean().item(),
    )


def scale_of(model):
    return sample_partition(3, 0, workers=WORKERS, pool=blueprint(model).pool).scale


@pytest.mark.parametrize("model", [PREACT, BASIC, BOTTLENECK])
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-6), ("float64", 1e-10)])
def test_the_result_is_that_of_a_plain_scaled_model(alone, model, dtype, tolerance):
    config = options(model=model, dtype=dtype)
    found = evaluate(alone, config, tests=60)
    logits, statistics, loss, accuracy = reference(model, scale_of(model), tests=60)
    ours = np.stack([found.logits[i] for i in range(60)])
    assert off(ours, logits.numpy()) < 10 * tolerance
    assert abs(found.loss - loss) <= 2 * np.abs(ours - logits.numpy()).max() + 1e-12  # whatever the logits
    assert_no_tie(logits.numpy())
    assert found.accuracy == accuracy
    assert found.statistics.keys() == statistics.keys()
    loose = 10 * tolerance
    for name, (mean, variance) in statistics.items():
        np.testing.assert_allclose(found.statistics[name][0], mean, rtol=loose, atol=loose, err_msg=name)
        np.testing.assert_allclose(found.statistics[name][1], variance, rtol=loose, atol=loose, err_msg=name)
    # It is a test of the scale only if the scale makes a difference, and of the norms if they differ.
    assert abs(reference(model, 1.0, tests=60)[2] - loss) > 1e-2
    assert 0.02 < logits.std() < 10


@pytest.mark.parametrize("calibration", [1, 40])
def test_statistics_of_few_images(alone, calibration):
    found = evaluate(alone, options(calibration_samples=calibration, dtype="float64"), tests=20)
    _, statistics, loss, _ = reference(PREACT, scale_of(PREACT), calibration=calibration, tests=20)
    assert found.loss == pytest.approx(loss, rel=1e-9)
    for name, (mean, variance) in statistics.items():
        np.testing.assert_allclose(found.statistics[name][0], mean, rtol=1e-9, atol=1e-9, err_msg=name)
        np.testing.assert_allclose(found.statistics[name][1], variance, rtol=1e-9, atol=1e-9, err_msg=name)


def test_variances_survive_a_large_mean(alone):
    """The difference of two large sums: in float32 nothing would be left of it."""
    evaluation = Evaluation(alone, Layout(1, 1), blueprint(PREACT), data_of()[0], options())
    x = 1000 + 0.01 * torch.randn(CALIBRATION, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    mean, variance = evaluation.estimate([moments(group) for group in evaluation.groups(x)])
    expected = x.double().transpose(0, 1).flatten(1)
    torch.testing.assert_close(mean, expected.mean(1), rtol=1e-12, atol=0)
    torch.testing.assert_close(variance, expected.var(1, unbiased=False), rtol=1e-4, atol=0)


def test_calibration_images_are_convolved_in_groups_of_one_size(alone):
    """Or a convolution may round differently on another number of ranks (not on every machine)."""
    sizes = Counter()

    class Convolutions(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.aten.convolution.default:
                sizes[len(args[0])] += 1
            return func(*args, **(kwargs or {}))

    with Convolutions():
        evaluate(alone, options(), tests=10)
    layers = sum(isinstance(m, nn.Conv2d) for m in timm_net(PREACT).modules())
    assert sizes.keys() == {10, 32, CALIBRATION % 32}
    assert sizes[10] == layers and sizes[32] == 2 * sizes[CALIBRATION % 32]
    assert sizes[32] >= 2 * (layers - 1)  # the classifier is not needed


@pytest.mark.parametrize("scenario", ["bf16", "bf16, no prefetch"])
def test_mixed_precision_is_a_rounded_evaluation_of_every_block(alone, scenario):
    """Autocast keeps casts of weights, by the tensor that they came from; a berth's weights change."""
    given, rest = SCENARIOS[scenario]
    found, exact = (evaluate(alone, options(**g), tests=60, **rest) for g in (given, {}))
    logits, expected = (np.stack([f.logits[i] for i in range(60)]) for f in (found, exact))
    assert 1e-5 < off(logits, expected) < 0.1
    assert found.loss == pytest.approx(exact.loss, rel=0.01)


@pytest.mark.parametrize("model", [PREACT, BASIC, BOTTLENECK])
def test_exported_weights_give_the_same_logits_in_stock_timm(alone, model):
    """Statistics as found, the scale in the weights: nothing of ours is needed any more."""
    found = evaluate(alone, options(model=model), tests=60)
    plan, net = blueprint(model), timm_net(model, torch.float32)
    values = {name: value.clone() for name, value in weights(model).items()}
    for block in range(plan.pool):
        prefix = plan.block_prefix(block)
        plan.fold(
            {n.removeprefix(prefix): v for n, v in values.items() if n.startswith(prefix)}, scale_of(model)
        )
    for name, (mean, variance) in found.statistics.items():
        values[f"{name}.running_mean"] = torch.from_numpy(mean).float()
        values[f"{name}.running_var"] = torch.from_numpy(variance).float()
        values[f"{name}.num_batches_tracked"] = torch.tensor(1)
    net.load_state_dict(values, strict=True)
    data, _ = data_of(tests=60)
    ((images, _),) = data.test_batches([np.arange(60)], torch.device("cpu"), torch.float32, False)
    with torch.no_grad():
        logits = net.eval()(images)
    assert off(np.stack([found.logits[i] for i in range(60)]), logits.numpy()) < 1e-5


def test_a_scale_of_one_is_the_whole_model(alone):
    """After a warm-up round, or with one worker, nothing is scaled."""
    found = evaluate(alone, options(dtype="float64"), tests=20, workers=1)
    assert found.loss == pytest.approx(reference(PREACT, 1.0, tests=20)[2], rel=1e-10)


# --- within a run


@pytest.mark.parametrize("given", [dict(workers=1), dict(workers=3, optimizer="adamw", channels_last=True)])
def test_evaluating_changes_no_trained_bit(alone, tmp_path, given):
    given |= dict(rounds=3, local_steps=2, batch_size=4, calibration_samples=8, eval_batch_size=256)
    vectors = []
    for every in (0, 1):
        trainer = Trainer(alone, options(eval_every=every, output_dir=str(tmp_path / str(every)), **given))
        results = []
        inner = trainer.net.evaluate
        trainer.net.evaluate = lambda *where, inner=inner, results=results: (
            results.append(inner(*where)) or results[-1]
        )
        trainer.run()
        assert len(results) == (3 if every else 1)
        vectors.append({w: v.clone() for w, v in trainer.workers.vectors.items()})
        assert trainer.workers.subnet.module.training
    assert all(torch.equal(vectors[0][w], vectors[1][w]) for w in vectors[0])
