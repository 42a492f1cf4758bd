"""Predictions against runs: memory counted here in another way, bytes from the ledger; and the advice."""

import gc
import json
import math
import runpy
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from weakref import WeakValueDictionary

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from resist_ds.comm import Comm
from resist_ds.engines.engine import TorchEngine
from resist_ds.engines.local import local_steps
from resist_ds.engines.parallel import Inside, data_parallel
from resist_ds.engines.spread import SpreadNet
from resist_ds.forecast.advice import advice
from resist_ds.forecast.footprint import Device, Footprints, Usage, count
from resist_ds.forecast.memory import AVERAGING, memory_of
from resist_ds.forecast.plan import STRATEGIES, Plan, Prediction, Question
from resist_ds.forecast.traffic import sent_per_step
from resist_ds.forecast.units import BANDWIDTHS, MEMORIES, SPEEDS, quantity
from resist_ds.nets.blueprint import Blueprint
from resist_ds.nets.subnet import StateLayout, Subnet, Worker
from resist_ds.options import strategy as ways
from resist_ds.options.config import Config
from resist_ds.protocol.partition import Layout, sample_partition
from resist_ds.protocol.sync import Synchroniser
from tests import (
    ROOT,
    oracle,  # registers the narrow nets
)
from tests.conftest import Ranks
from tests.saved import train

TOOL = ROOT / "tools" / "plan.py"
BY_FORMULA = tuple(name for name in STRATEGIES if ways.STRATEGIES[name].spread)
COUNTED = tuple(s for s in STRATEGIES if s not in BY_FORMULA)
CPU = torch.device("cpu")
BASIC, BOTTLENECK, WIDE = (
    net.__name__ for net in (oracle.resist_test_basic, oracle.resist_test_bottleneck, oracle.resist_test_wide)
)

# ------------------------------------------------------------------------------------------------------------
# Memory


class Live(TorchDispatchMode):
    """The peak of all tensors that operations see: after each, the storages that still exist are summed."""

    def __init__(self, *there: Tensor) -> None:
        super().__init__()
        self.storages = WeakValueDictionary({t.untyped_storage()._cdata: t.untyped_storage() for t in there})
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        stack: list[Any] = [out, *args]
        while stack:
            item = stack.pop()
            if isinstance(item, list | tuple):
                stack += item
            elif isinstance(item, DTensor):  # its own storage is none, and says the size of the whole
                stack.append(item._local_tensor)
            elif isinstance(item, Tensor) and not item.is_meta:
                storage = item.untyped_storage()
                if storage.nbytes():
                    self.storages[storage._cdata] = storage
        self.peak = max(self.peak, sum(storage.nbytes() for storage in self.storages.values()))
        return out


def make(config: Config, slots: int | None, device: torch.device) -> Subnet:
    """A real sub-ResNet; all of the pool in it if `slots` is None."""
    blueprint = Blueprint(config.model, 10)
    layout = StateLayout.of(blueprint, config, blueprint.pool if slots is None else slots)
    subnet = Subnet(blueprint, layout, config, device)
    subnet.vector.fill_(0.01)
    return subnet


def steps(subnet: Subnet, config: Config, img_size: int, number: int = 2, comm: Comm | None = None) -> None:
    """Real local steps, on noise; under ddp where there are ranks."""
    device = subnet.vector.device
    x = torch.randn(config.batch_size, 3, img_size, img_size, device=device, dtype=subnet.vector.dtype)
    y = torch.zeros(config.batch_size, dtype=torch.long, device=device)
    worker = Worker(0, subnet.vector, torch.amp.GradScaler(device.type, enabled=False))
    engine = TorchEngine(subnet, config)
    if comm is not None:
        engine.forward = data_parallel(Inside.of(comm, replace(config, strategy="ddp")), engine.forward)
    engine.load(worker)
    local_steps(engine, iter([(x, y)] * number), rates=[0.1] * number)


@pytest.mark.numerical
@pytest.mark.parametrize(
    ("model", "slots", "device", "options"),
    [
        (BASIC, 2, "cpu", {}),
        (BASIC, None, "cuda", {"activation_checkpointing": True}),
        (BASIC, 3, "cuda", {"mixed_precision": "bf16", "batch_size": 16}),
        (BOTTLENECK, 2, "cuda", {"optimizer": "adamw", "activation_checkpointing": True}),
        (BOTTLENECK, None, "cpu", {"batch_size": 3, "momentum": 0.0}),
        (WIDE, 1, "cuda", {"optimizer": "adamw"}),
        (WIDE, None, "cuda", {"nesterov": True, "dtype": "float64"}),
        ("preact_resnet101", 6, "cuda", {"batch_size": 2}),
        ("preact_resnet101", 6, "cpu", {"batch_size": 2, "activation_checkpointing": True}),
    ],
)
def test_the_peak_of_a_step_is_that_of_real_local_steps(
    model: str, slots: int | None, device: Device, options: dict[str, Any], fixed_threads: None
) -> None:
    """On tensors in host memory; `cuda` means here that SGD is one kernel."""
    config = Config(**{"model": model, "batch_size": 8, "mixed_precision": "no", **options})
    subnet = make(config, slots, CPU)
    if config.optimizer == "sgd":
        subnet.optimizer.param_groups[0] |= {"foreach": False, "fused": device == "cuda"}
    with Live(*subnet.module.buffers()) as live:  # no operation of a step sees these
        steps(subnet, config, 32)
    predicted = count(Blueprint(model, 10), config, subnet.layout.slots, 32, device).usage(config.batch_size)
    assert predicted.peak == pytest.approx(live.peak, rel=2e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("activation_checkpointing", [False, True])
@pytest.mark.parametrize("mixed_precision", ["no", "bf16"])
@pytest.mark.parametrize(
    ("model", "img_size", "slots"), [("preact_resnet101", 32, 6), ("resnetv2_50", 224, 2)]
)
def test_the_peak_of_a_step_on_a_gpu(
    model: str, img_size: int, slots: int, mixed_precision: str, activation_checkpointing: bool
) -> None:
    config = Config(
        model=model,
        batch_size=64,
        mixed_precision=mixed_precision,  # type: ignore[arg-type]
        activation_checkpointing=activation_checkpointing,
    )
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    subnet = make(config, slots, torch.device("cuda"))
    steps(subnet, config, img_size)  # cuDNN's workspaces while it looks for its algorithms
    torch.cuda.reset_peak_memory_stats()
    steps(subnet, config, img_size)
    measured = torch.cuda.max_memory_allocated() - before
    predicted = count(Blueprint(model, 10), config, slots, img_size).usage(config.batch_size)
    assert predicted.peak == pytest.approx(measured, rel=0.1)


@pytest.mark.parametrize("activation_checkpointing", [False, True])
def test_between_two_counts_a_step_is_as_counted(activation_checkpointing: bool) -> None:
    """For any number of blocks and images; a peak is never below what would be counted."""
    config = Config(model=BOTTLENECK, activation_checkpointing=activation_checkpointing)
    blueprint = Blueprint(BOTTLENECK, 10)
    between = Footprints(blueprint, config, 1, 32, "cuda")
    counted = count(blueprint, config, 3, 32)
    for batch in (2, 7, 64):
        ours, true = between.usage(3, batch), counted.usage(batch)
        assert replace(ours, live=true.live, beside=true.beside) == true
        assert true.peak <= ours.peak <= 1.01 * true.peak
        assert true.passes <= ours.passes <= 1.01 * true.passes


def of_one_ddp_rank(comm: Comm, config: Config) -> int:
    """Peak of real steps under ddp, in bytes."""
    with Live() as live:
        steps(make(config, None, CPU), config, 32, comm=comm)
    return live.peak


@pytest.mark.ranks
def test_the_peak_of_ddp_is_that_of_real_steps(ranks: Ranks) -> None:
    """Its gradients live in buckets, and the peak is before the first is finished."""
    config = Config(model="preact_resnet_small", batch_size=8)
    measured = ranks(of_one_ddp_rank, 2, config)
    plan = plan_of(config, (2,), device="cpu")
    assert measured == pytest.approx([plan.predict("ddp", 2).step] * 2, rel=0.01)
    assert plan.predict("ddp", 2).step > 1.1 * plan.predict("local_sgd", 2).step


def of_a_spread_step(comm: Comm, config: Config) -> int:
    """Peak of real steps of a net that is spread over the ranks, in bytes."""
    blueprint = Blueprint(config.model, 10)
    deal = sample_partition(0, 0, workers=comm.size, pool=blueprint.pool)
    with Live() as live:
        net = SpreadNet(comm, Layout(comm.size, comm.size), blueprint, config, deal)
        net.connect()
        gc.collect()
        live.peak = 0
        x = torch.randn(config.batch_size, 3, 32, 32)
        for _ in range(2):
            net.engine.step(x, torch.zeros(config.batch_size, dtype=torch.long), 0.1)
    return live.peak


@pytest.mark.ranks
@pytest.mark.parametrize("strategy", BY_FORMULA)
def test_the_peak_of_a_spread_step_is_nearly_that_of_real_ones(strategy: Any, ranks: Ranks) -> None:
    """With DeepSpeed's bucket of gradients, which alone is larger than this net."""
    config = Config(model="preact_resnet_small", batch_size=16, strategy=strategy)
    measured = ranks(of_a_spread_step, 2, config)
    assert measured == pytest.approx(
        [plan_of(config, (2,), device="cpu").predict(strategy, 2).step] * 2, rel=0.1
    )


def plan_of(config: Config, workers: tuple[int, ...], **given: Any) -> Plan:
    """At 32 pixels, 10 classes, 1 Gbit/s and 1 GiB."""
    rest: dict[str, Any] = {"img_size": 32, "bandwidth": 125e6, "memory": float(2**30), **given}
    return Plan(Question(Blueprint(config.model, 10), config, workers=workers, **rest))


@pytest.fixture(scope="module")
def paper() -> Plan:
    """Of the paper's CIFAR net, 128 images a step."""
    return plan_of(Config(model="preact_resnet101"), (2, 4, 8))


def test_training_state_of_four_workers_is_little_more_than_half_of_ddps(paper: Plan) -> None:
    ours, ddp = paper.predict("resist", 4), paper.predict("ddp", 4)
    assert 0.5 < ours.training_state / ddp.training_state <= 0.56
    assert ddp.parameters == paper.question.blueprint.parameters
    assert ddp.training_state == pytest.approx(3 * 4 * ddp.parameters, rel=1e-3)


def test_peaks_of_a_round(paper: Plan) -> None:
    """The exchange buffer stays beside the step; a synchronisation holds no gradients."""
    ours = paper.predict("resist", 4)
    assert ours.transit == 64 << 20
    assert ours.peak == ours.step + ours.transit
    assert ours.sync == pytest.approx(ours.weights + ours.optimizer + ours.transit, rel=0.02)
    compact = paper.predict("resist", 4, wire="compact")  # keeps in host memory
    assert replace(compact, wire="exact", kept=0, **sent_by(ours)) == ours
    small = plan_like(paper, config=replace(paper.question.config, transit_mib=1))
    block = StateLayout.of(paper.question.blueprint, paper.question.config, 1).block.numel
    assert small.predict("resist", 4).transit == 4 * block  # at least one, with its momentum


def sent_by(of: Prediction) -> dict[str, Any]:
    """What depends on the bytes."""
    return {name: getattr(of, name) for name in ("sent_step", "sent_round", "communication", "exposed")}


class Deaf:
    """Rank 0 of two: what the other one sends is zeros."""

    rank, size = 0, 2
    device = buffer_device = CPU

    def buffer(self, numel: int, like: Tensor) -> Tensor:
        return torch.zeros(numel, dtype=like.dtype)

    def exchange(self, sends: Any, receives: Any, kind: str) -> None:
        for tensor, _ in receives:
            tensor.zero_()


@pytest.mark.parametrize("wire", ["exact", "compact"])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_the_peak_of_a_synchronisation_is_that_of_a_real_one(wire: Any, optimizer: Any) -> None:
    """On a CPU, where what the compact wire keeps is part of it."""
    config = Config(model="preact_resnet101", optimizer=optimizer, wire=wire)
    blueprint = Blueprint(config.model, 10)
    now, then = (sample_partition(0, r, workers=2, pool=blueprint.pool) for r in (0, 1))
    state = StateLayout.of(blueprint, config, now.slots)
    vectors = {0: torch.rand(state.numel)}
    given: dict[str, Any] = {"budget": config.transit_mib << 20, "travel": True, "vectors": vectors}
    deaf: Any = Deaf()
    sync = Synchroniser(deaf, Layout(2, 2), state, blueprint.pool, compact=config.wire == "compact", **given)
    kept = sync.differences.nbytes if sync.differences else 0
    beside = [] if not kept else [*sync.differences.reference.values(), *sync.differences.error.values()]  # type: ignore[union-attr]
    with Live(*vectors.values(), *beside) as live:
        sync.aggregate(vectors, now)
        sync.hand_off(vectors, now, then)
    usage = Usage(vectors[0].nbytes, 0, 0, (0, 0, 0), (0, 0, 0), 0)
    memory = memory_of("resist", 2, now.slots, usage, blueprint, config, "cpu")
    assert memory["kept"] == kept and (kept > 0) == (wire == "compact")
    assert memory["sync"] == pytest.approx(live.peak, rel=2e-3)


def test_an_overlap_keeps_two_copies_and_hides_its_steps(paper: Plan) -> None:
    config = replace(paper.question.config, overlap_steps=3)
    timed = {"speed": 1e12, "config": config}
    here, there = (
        plan_like(paper, device=device, **timed).predict("resist", 4) for device in ("cpu", "cuda")
    )
    layout = StateLayout.of(paper.question.blueprint, config, there.slots)
    copies = (4 * layout.shared.numel,) * 2
    assert here.kept == sum(copies)
    assert there.kept == sum(2 ** math.ceil(math.log2(size)) for size in copies) > here.kept  # pinned
    alone = plan_like(paper, device="cpu", speed=1e12).predict("resist", 4)
    assert here.sync == alone.sync + here.kept
    assert here.step == alone.step + here.kept + AVERAGING  # an average is taken beside it
    assert there.step == alone.step
    assert here.exposed == pytest.approx(here.communication - 3 * here.multiply_adds / 1e12)
    assert 0 < here.exposed < alone.exposed == alone.communication == here.communication  # type: ignore[operator]
    faster = plan_like(paper, bandwidth=1e12, **timed).predict("resist", 4)
    # All but blocks hides: 24 slots hold 22 of them, and three in four change hands, with momentum.
    blocks = (24 - 22 + 0.75 * 24) * 8 * layout.block.parameters
    assert 1e12 * faster.exposed == pytest.approx(blocks / 4, rel=0.05)  # type: ignore[operator]
    assert paper.predict("resist", 4).exposed is None
    assert plan_like(paper, **timed).predict("ddp", 4).kept == 0


# ------------------------------------------------------------------------------------------------------------
# Multiply-adds and bytes


@pytest.mark.parametrize(("model", "img_size"), [(BASIC, 32), (WIDE, 48)])
def test_multiply_adds_are_those_of_the_plain_net(model: str, img_size: int) -> None:
    blueprint = Blueprint(model, 10)
    net = timm.create_model(model, num_classes=10, device="meta").train()
    with FlopCounterMode(display=False) as counter:
        F.cross_entropy(
            net(torch.zeros(6, 3, img_size, img_size, device="meta")),
            torch.zeros(6, dtype=torch.long, device="meta"),
        ).backward()
    usage = count(blueprint, Config(model=model), blueprint.pool, img_size).usage(6)
    assert 2 * usage.multiply_adds == counter.get_total_flops()


def train_each(comm: Comm, options: list[dict[str, Any]]) -> None:
    """One run after the other."""
    for each in options:
        train(comm, each)


@pytest.mark.ranks
@pytest.mark.parametrize("workers", [3, 4])
def test_bytes_are_those_of_the_ledger(workers: int, ranks: Ranks, tmp_path: Path) -> None:
    state = {strategy: "reset" if strategy == "resist" and workers == 3 else "travel" for strategy in COUNTED}
    seldom = {"eval_every": 0, "checkpoint_every": 0, "rounds": 20, "local_steps": 2, "workers": workers}
    wire = {strategy: "compact" if strategy == "resist" and workers == 4 else "exact" for strategy in COUNTED}
    runs = [
        {"strategy": s, "optimizer_state": state[s], "wire": wire[s], "output_dir": str(tmp_path / s)}
        | seldom
        for s in COUNTED
    ]
    ranks(train_each, workers, runs)
    for strategy in COUNTED:
        lines = map(json.loads, (tmp_path / strategy / "metrics.jsonl").read_text().splitlines())
        sent = [line["comm/bytes_round"] for line in lines if line["kind"] == "round"]
        config = Config(model=BASIC, local_steps=2, optimizer_state=state[strategy])  # type: ignore[arg-type]
        plan = plan_like(tiny(), config=config, workers=(workers,))
        predicted = plan.predict(strategy, workers, wire=wire[strategy])  # type: ignore[arg-type]
        assert len(sent) == 20 and predicted.sent_round == pytest.approx(sum(sent) / 20, rel=0.01)
        assert predicted.sent_step == predicted.sent_round / 2
        assert predicted.communication == predicted.sent_round / workers / 125e6


@cache
def tiny() -> Plan:
    """Of the net that `train` trains."""
    return plan_of(Config(model=BASIC), (4,))


def test_bytes_by_formula() -> None:
    """One rank sends nothing. What FSDP2 gathers once is what is in no residual block."""
    config, blueprint = Config(), Blueprint("preact_resnet_small", 10)
    assert not any(sent_per_step(strategy, blueprint, config, 1) for strategy in STRATEGIES[2:])
    everything = 4 * blueprint.parameters
    sent = {strategy: sent_per_step(strategy, blueprint, config, 2) for strategy in STRATEGIES[2:]}
    assert sent["ddp"] == 2 * everything
    assert sent["zero1"] == sent["zero2"] == sent["zero3"] == 3 * everything
    root = 4 * sum(
        torch.Size(shape).numel() for name, shape in blueprint.shapes.items() if ".blocks." not in name
    )
    assert sent["fsdp"] == 3 * everything - root  # all first dimensions are even
    assert sent_per_step("fsdp", blueprint, config, 3) > 2 * sent["fsdp"]  # padded


# ------------------------------------------------------------------------------------------------------------
# Advice


def advised(plan: Plan) -> dict[str, Any]:
    return {item.option: item.value for item in advice(plan)}


@pytest.mark.parametrize("share", [0.35, 0.6, 0.8, 0.95, 1.5])
def test_what_is_advised_fits_and_a_block_or_twice_the_images_more_would_not(
    paper: Plan, share: float
) -> None:
    """The memory as a share of what a batch of 128 takes in the smallest sub-ResNet."""
    memory = share * paper.predict("resist", 8).peak / 0.9
    plan = plan_like(paper, memory=memory)
    options = advised(plan)
    assert options["workers"] == 8
    assert options["activation_checkpointing"] == (share < 1)
    given = {"activation_checkpointing": options["activation_checkpointing"]}

    def fits(slots: int, batch: int) -> bool:
        return plan.predict("resist", 8, slots=slots, batch=batch, **given).peak <= 0.9 * memory

    slots, batch = max(3, options["min_blocks"]), options["batch_size"]
    assert fits(slots, batch)
    assert fits(22, batch) if slots == 3 and fits(4, batch) else not fits(slots + 1, batch)
    assert batch == 128 or not fits(3, 2 * batch)


def plan_like(plan: Plan, **changes: Any) -> Plan:
    """The same counts for another machine."""
    other = Plan.__new__(Plan)
    other.__dict__ = {**plan.__dict__, "question": replace(plan.question, **changes)}
    return other


def test_nothing_is_advised_where_nothing_fits(paper: Plan) -> None:
    assert advised(plan_like(paper, memory=2e8)) == {}


def test_local_steps_are_the_fewest_that_the_link_allows(paper: Plan) -> None:
    ample = plan_like(paper, memory=1e11)
    options = advised(ample)
    asked = options["local_steps"]
    assert options["wire"] == "compact"
    ours, ddp = ample.predict("resist", 8, wire="compact"), ample.predict("ddp", 8)
    assert ours.sent_round / asked <= 0.1 * ddp.sent_step < ours.sent_round / (asked - 1)
    timed = plan_like(ample, speed=1e13, wires=("exact",), bandwidth=2e10)
    options, ours = advised(timed), timed.predict("resist", 8)
    asked = options["local_steps"]
    assert options["wire"] == "exact" and 1 < asked <= 5
    assert ours.computation == pytest.approx(50 * ours.multiply_adds / 1e13)
    for number, enough in ((asked, True), (asked - 1, False)):
        local = number * ours.multiply_adds / 1e13
        assert (ours.communication / (ours.communication + local) <= 0.1) == enough


def test_rounds_that_grow_count_by_their_mean(paper: Plan) -> None:
    """At 1, 1/10 and 1/100 of the rate for 1/2, 1/4 and 1/4 of the images: 5, 50 and 50 local steps."""
    timed = plan_like(paper, speed=1e13)
    growing = plan_like(timed, config=replace(paper.question.config, local_steps=5, local_steps_max=50))
    alike = plan_like(timed, config=replace(paper.question.config, local_steps=5))
    for strategy in ("resist", "ddp"):
        found, plain = growing.predict(strategy, 8), alike.predict(strategy, 8)
        mean = 1 / (0.5 / 5 + 0.5 / 50)
        assert found.computation is not None and plain.computation is not None
        assert found.computation / plain.computation == pytest.approx(mean / 5)
        longer, fewer = (mean / 5, 1) if strategy == "ddp" else (1, 5 / mean)
        assert found.sent_round / plain.sent_round == pytest.approx(longer)
        assert found.sent_step / plain.sent_step == pytest.approx(fewer)
    assert advised(plan_like(growing, memory=1e11)) == advised(plan_like(timed, memory=1e11))


@pytest.mark.parametrize("bandwidth", [1e7, 1e8, 1e9, 3e9, 1e10, 1e11, 1e12])
def test_a_slower_link_asks_for_the_compact_wire(paper: Plan, bandwidth: float) -> None:
    """Whatever it is, little of a round is communication, and one local step fewer would not do."""
    speed = 1e13
    plan = plan_like(paper, memory=1e11, speed=speed, bandwidth=bandwidth)
    options = advised(plan)
    steps = options["local_steps"]
    exact, ours = (plan.predict("resist", 8, wire=wire) for wire in ("exact", options["wire"]))

    def share(of: Prediction, steps: int) -> float:
        return of.communication / (of.communication + steps * of.multiply_adds / speed)

    assert (options["wire"] == "exact") == (share(exact, 5) <= 0.1)
    assert share(ours, steps) <= 0.1
    assert steps == 1 or share(ours, steps - 1) > 0.1


# ------------------------------------------------------------------------------------------------------------
# The tool


@pytest.fixture
def call(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., SimpleNamespace]:
    """`call(*arguments)` runs the tool: its exit code, stdout and stderr."""

    def run(*arguments: object) -> SimpleNamespace:
        monkeypatch.setattr(sys, "argv", [str(TOOL), *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(TOOL), run_name="__main__")
        said = capsys.readouterr()
        return SimpleNamespace(code=ended.value.code, out=said.out, err=said.err)

    return run


def test_what_is_printed_is_what_is_written(call: Any, tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    asked = ("preact_resnet_small", "--workers", "4,2,4", "--batch_size", "8", "--local_steps_max", "500")
    done = call(*asked, "--flops", "10tflops", "--json", file)
    assert (done.code, done.err) == (0, "")
    assert ", 50 to 500 local steps a round, 90.9 in the mean by --schedule step, " in done.out
    written = json.loads(file.read_text())
    rows = written["rows"]
    assert len(rows) == 2 * 9 * 2 and written["predicted"] is True
    assert {(row["strategy"], row["workers"]) for row in rows} == {(s, w) for s in STRATEGIES for w in (2, 4)}
    assert [row["by_formula"] for row in rows[::2]] == 2 * ([False] * 5 + [True] * 4)
    lines = [line for line in done.out.splitlines() if line.startswith(("resist ", "zero3* "))]
    assert len(lines) == 12
    chosen = next(r for r in rows if r["strategy"] == "resist" and r["workers"] == 4)
    assert f"{chosen['peak_bytes'] / 2**20:,.0f}" in lines[1]
    assert f"{chosen['sent_round_bytes'] / 1e6:,.1f}" in lines[1]
    for part in done.out.split("\n\n"):
        assert "predicted" in part
    assert [item["option"] for item in written["advice"]] == [
        line.split()[0][2:] for line in done.out.splitlines() if line.startswith("  --")
    ]


GOOD = ("preact_resnet_small", "--workers", "2", "--batch_size", "8")


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (("resnet9000", *GOOD[1:]), "unknown --model resnet9000"),
        (("vit_base_patch16_224", *GOOD[1:]), "--model vit_base_patch16_224 is of no family"),
        ((*GOOD, "--workers", "two"), "--workers is 'two': type whole numbers above 0, for instance 2,4,8"),
        ((*GOOD, "--workers", "2,,4"), "--workers is '2,,4'"),
        ((*GOOD, "--workers", "0"), "--workers is '0'"),
        ((*GOOD, "--batch_size", "0"), "--batch_size is 0"),
        ((*GOOD, "--batch_size", "many"), "argument --batch_size: invalid int value: 'many'"),
        ((*GOOD, "--img_size", "0"), "--img_size is 0"),
        ((*GOOD, "--num_classes", "0"), "--num_classes is 0"),
        ((*GOOD, "--min_blocks", "9"), "--min_blocks 9 is more than preact_resnet_small has: type at most 8"),
        ((*GOOD, "--local_steps_max", "9"), "--local_steps_max is 9: type at least 50, --local_steps"),
        ((*GOOD, "--bandwidth", "10"), "--bandwidth is '10': type a number above 0 and a unit (kbit, mbit"),
        ((*GOOD, "--bandwidth", "10gib"), "--bandwidth is '10gib'"),
        ((*GOOD, "--memory", "0gib"), "--memory is '0gib'"),
        ((*GOOD, "--flops", "fast"), "--flops is 'fast'"),
        ((*GOOD, "--wire", "exact,short"), "--wire is 'exact,short': type exact, compact, or exact,compact"),
        ((*GOOD, "--overlap_steps", "50"), "--overlap_steps is 50: type less than --local_steps 50"),
        ((*GOOD, "--optimizer", "lion"), "argument --optimizer: invalid choice: 'lion'"),
        ((*GOOD, "--speed"), "unrecognized arguments: --speed"),
        (GOOD[:3], "the following arguments are required: --batch_size"),
        (
            (*GOOD, "--json", "/no/such/folder/plan.json"),
            "--json /no/such/folder/plan.json cannot be written",
        ),
    ],
)
def test_wrong_calls_get_one_line(call: Any, arguments: tuple[str, ...], line: str) -> None:
    done = call(*arguments)
    assert (done.code, done.out) == (2, "")
    assert done.err.startswith(f"error: {line}") and done.err.count("\n") == 1


def test_quantities() -> None:
    assert quantity("--bandwidth", "10gbit", BANDWIDTHS) == 1.25e9
    assert quantity("--memory", "1.5 GiB", MEMORIES) == 1.5 * 2**30
    assert quantity("--flops", "10TFLOPS", SPEEDS) == 5e12
