"""Engines: nets that FSDP2 and ZeRO spread over the ranks, DeepSpeed around sub-ResNets, stochastic depth."""

import json
import math
import typing
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from resist_ds.comm import Comm
from resist_ds.engines import deepspeed_options
from resist_ds.engines.engine import RandomDepth
from resist_ds.engines.parallel import deepspeed_schedule
from resist_ds.errors import UserError
from resist_ds.forecast.traffic import sent_per_step
from resist_ds.nets.blueprint import Blueprint
from resist_ds.options.command_line import parse
from resist_ds.options.config import Config
from resist_ds.options.deepspeed_fields import ZERO_PASSED_ON
from resist_ds.protocol.partition import sample_partition
from resist_ds.trainer import Trainer
from tests import oracle, saved
from tests.conftest import Ranks
from tests.protocol.test_oracle import BASE, assert_agreement, train
from tests.saved import OPTIONS, checkpoints, digest, last, loss_log, outcome, tensors

SPREAD = ("fsdp", "zero1", "zero2", "zero3")
RUN: dict[str, Any] = {
    "workers": None,
    "rounds": 5,
    "local_steps": 2,
    "batch_size": 16,
    "eval_every": 0,
    "checkpoint_every": 0,
    "schedule": "constant",
}


# Pixels. At 8 this net, of 4 channels and maps of 1×1, now and then gets NaN from a CPU's bf16 kernels, under
# autocast too; never so far at 32.
BF16_SIZE = 32


def written(folder: Path, content: object) -> str:
    """A DeepSpeed file."""
    path = folder / "deepspeed.json"
    path.write_text(json.dumps(content))
    return str(path)


# ------------------------------------------------------------------------------------------------------------
# Spread over the ranks.


def results(folder: Path) -> dict[str, np.ndarray]:
    """What a run came to, a vector for each kind of numbers: losses, changes of parameters, momentum, …"""
    start = Blueprint(OPTIONS["model"], 10)
    initial = dict(start.initial_shared(0))
    for block in range(start.pool):
        prefix = start.block_prefix(block)
        initial |= {prefix + name: value for name, value in start.initial_block(0, block).items()}
    parts: dict[str, list[np.ndarray]] = {}
    for line in loss_log(folder):
        for key in sorted(line.keys() & {"train/loss", "eval/loss"}):
            parts.setdefault(key, []).append(np.array([line[key]]))
    for name, array in sorted(tensors(last(folder)).items()):
        change = array.astype(np.float64) - (initial[name].numpy() if name in initial else 0)
        kind = "parameters" if name in initial else name.rpartition(".")[2]
        parts.setdefault(kind, []).append(change.ravel())
    return {kind: np.concatenate(arrays) for kind, arrays in parts.items()}


def assert_the_same_training(found: Path, exact: Path) -> None:
    """A run in float32 differs from one in float64 by less than a thousandth of what training does.

    By the norm, for each kind of numbers: what becomes of a last bit in some steps is up to the processor's
    kernels, and no bound on a single number would be right on all of them.
    """
    ours, theirs = results(found), results(exact)
    assert ours.keys() == theirs.keys()
    for kind, values in theirs.items():
        error = np.linalg.norm(ours[kind] - values) / max(float(np.linalg.norm(values)), 1e-9)
        assert error <= 1e-3, f"{kind} is off by {error:.1e} of its norm"


@pytest.mark.numerical
@pytest.mark.ranks
@pytest.mark.parametrize(
    ("size", "options"),
    [
        (3, {"activation_checkpointing": True, "accumulation_steps": 2, "clip_grad": 1.0}),
        # At AdamW's usual ε a gradient that is nothing but float32's rounding moves a weight as far as any
        # other does, and in any direction; at this one, by next to nothing.
        (2, {"optimizer": "adamw", "lr": 3e-3, "eps": 1e-3}),
    ],
    ids=["sgd-checkpointing-accumulation-clipping", "adamw"],
)
def test_all_lockstep_strategies_agree_over_ten_steps(
    size: int, options: dict[str, Any], ranks: Ranks, tmp_path: Path
) -> None:
    """One seed, one net, one order of the data: losses, weights and optimizer state after ten steps.

    To the last digits in float64, which DeepSpeed does not know.
    """

    def run(strategy: str, dtype: str) -> Path:
        folder = tmp_path / f"{strategy}-{dtype}"
        ways = {"strategy": strategy, "dtype": dtype, "weight_decay": 0.1, "output_dir": str(folder)}
        ranks(saved.train, size, RUN | options | ways)
        return folder

    exact = run("ddp", "float64")
    assert loss_log(exact)[-1]["global_step"] == 10
    expected, start = tensors(last(exact)), Blueprint(OPTIONS["model"], 10).initial_shared(0)
    assert max(np.abs(expected[name] - value.numpy()).max() for name, value in start.items()) > 5e-3

    fsdp = run("fsdp", "float64")
    for kind, values in results(fsdp).items():
        np.testing.assert_allclose(values, results(exact)[kind], rtol=1e-9, atol=1e-10, err_msg=kind)
    assert tensors(last(fsdp)).keys() == expected.keys()

    for strategy in ("zero1", "zero2", "zero3"):
        zero = run(strategy, "float32")
        assert tensors(last(zero)).keys() == expected.keys()
        assert_the_same_training(zero, exact)


@pytest.mark.ranks
@pytest.mark.parametrize("strategy", SPREAD)
def test_a_resumed_run_is_the_uninterrupted_one(strategy: str, ranks: Ranks, tmp_path: Path) -> None:
    """Weights, momentum and AdamW's counter leave the shards and come back into them."""
    options = RUN | {
        "strategy": strategy,
        "optimizer": "adamw",
        "lr": 1e-3,
        "checkpoint_every": 1,
        "rounds": 3,
    }
    ranks(saved.train, 2, options | {"output_dir": str(tmp_path / "whole")})
    place = {"output_dir": str(tmp_path / "run")}
    ranks(saved.train, 2, options | place | {"rounds": 2})
    ranks(saved.train, 2, options | place | {"resume": "auto", "override": "rounds"})
    assert digest(last(tmp_path / "run")) == digest(last(tmp_path / "whole"))


@pytest.mark.ranks
@pytest.mark.parametrize("strategy", ["fsdp", "zero3"])
def test_nothing_is_lost_between_strategies(strategy: str, ranks: Ranks, tmp_path: Path) -> None:
    """From resist into the shards of other ranks, and back: at learning rate 0 no weight changes."""
    still = RUN | {"lr": 0.0, "weight_decay": 0.0, "output_dir": str(tmp_path), "local_steps": 1}
    ranks(saved.train, 2, still | {"workers": 3, "rounds": 1})
    goes_on = {"resume": "auto", "override": "strategy,rounds"}
    ranks(saved.train, 3, still | goes_on | {"strategy": strategy, "rounds": 2})
    ranks(saved.train, 1, still | goes_on | {"workers": 2, "rounds": 3})
    first, *others = [tensors(tmp_path / "checkpoints" / name) for name in checkpoints(tmp_path)]
    weights = [name for name in first if name in Blueprint(OPTIONS["model"], 10).shapes]
    assert len(others) == 2 and weights
    for other in others:
        assert all(first[name].tobytes() == other[name].tobytes() for name in weights)


@pytest.mark.ranks
@pytest.mark.parametrize(("precision", "gathered"), [("no", 4), ("bf16", 2)])
def test_the_bytes_of_fsdp_are_gathers_and_a_reduce_scatter(
    precision: str, gathered: int, ranks: Ranks, tmp_path: Path
) -> None:
    """Each block's parameters are gathered forward and backward, the root's once; gradients go back once."""
    options = RUN | {"strategy": "fsdp", "rounds": 2, "mixed_precision": precision, "img_size": BF16_SIZE}
    ranks(saved.train, 2, options | {"output_dir": str(tmp_path)})
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    sent = {line["comm/bytes_round"] for line in lines if line["kind"] == "round"}
    net = Blueprint(OPTIONS["model"], 10).subnet(7)
    blocks = [m for m in net.modules() if isinstance(m, oracle.BasicBlock)]
    in_blocks = sum(p.numel() for block in blocks for p in block.parameters())
    everything = sum(p.numel() for p in net.parameters())
    gathers = (2 * in_blocks + (everything - in_blocks)) * gathered
    least = 2 * (gathers + everything * 4) // 2 * 2  # steps, halves, ranks
    assert len(sent) == 1
    assert least <= (found := sent.pop()) <= 1.02 * least  # tensors of odd lengths are padded
    config = Config(model=OPTIONS["model"], mixed_precision=precision)  # type: ignore[arg-type]
    assert found == pytest.approx(2 * sent_per_step("fsdp", Blueprint(OPTIONS["model"], 10), config, 2))


def train_as(comm: Comm, options: dict[str, Any]) -> tuple[list[str], list[np.ndarray]]:
    """A run with torch's compiler, if it is used, without C++: the modules it calls, and what it trained."""
    compiler = torch.compile
    torch.compile = partial(compiler, backend="aot_eager")  # type: ignore[assignment]
    try:
        trainer = Trainer(comm, Config(**OPTIONS | options))  # type: ignore[arg-type]
        trainer.run()
    finally:
        torch.compile = compiler  # type: ignore[assignment]
        torch._dynamo.reset()
    trainer.folder.release()
    called, inside = [], trainer.workers.engine.forward  # type: ignore[union-attr]
    while (name := type(inside).__name__) in ("OptimizedModule", "DistributedDataParallel"):
        called.append(name)
        inside = getattr(inside, "_orig_mod", None) or inside.module  # type: ignore[assignment]
    return called, [vector.numpy() for vector in trainer.workers.vectors.values()]


@pytest.mark.ranks
def test_ddp_is_compiled_with_the_net(ranks: Ranks, tmp_path: Path) -> None:
    """Around a compiled net, gradients would be averaged when all of them are there, and nothing overlap."""
    options = RUN | {"strategy": "ddp", "rounds": 1}
    eager = ranks(train_as, 2, options | {"output_dir": str(tmp_path / "eager")})
    compiled = ranks(train_as, 2, options | {"compile": True, "output_dir": str(tmp_path / "compiled")})
    for (plain, vectors), (names, others) in zip(eager, compiled, strict=True):
        assert plain == ["DistributedDataParallel"]
        assert names == ["OptimizedModule", "DistributedDataParallel"]
        np.testing.assert_allclose(vectors[0], others[0], rtol=1e-4, atol=1e-6)


@pytest.mark.numerical
@pytest.mark.ranks
def test_fsdp_in_bf16_is_as_near_to_float32_as_autocast_is(ranks: Ranks, tmp_path: Path) -> None:
    """Weights are gathered in bf16 and kept in fp32: what training changes is far below a bf16's last bit."""

    def run(strategy: str, precision: str) -> dict[str, np.ndarray]:
        folder = tmp_path / f"{strategy}-{precision}"
        given = {"strategy": strategy, "mixed_precision": precision, "img_size": BF16_SIZE}
        ranks(saved.train, 2, RUN | given | {"output_dir": str(folder)})
        return results(folder)

    exact, autocast, fsdp = run("ddp", "no"), run("ddp", "bf16"), run("fsdp", "bf16")
    for kind in ("parameters", "momentum_buffer"):
        allowed = np.linalg.norm(autocast[kind] - exact[kind])
        assert 0 < np.linalg.norm(fsdp[kind] - exact[kind]) <= 2 * allowed, kind


@pytest.mark.ranks
@pytest.mark.parametrize("strategy", ["ddp", *SPREAD])
def test_too_few_ranks(strategy: str, ranks: Ranks, tmp_path: Path) -> None:
    options = {"strategy": strategy, "workers": 4, "output_dir": str(tmp_path / "run")}
    results = ranks(outcome, 2, tmp_path, options)
    line = f"--strategy {strategy} has one worker per rank: type --workers 2, or start 4 ranks"
    assert results == [(2, f"error: {line}\n"), (2, "")]


def spoils_a_gradient(comm: Comm, folder: Path, options: dict[str, Any]) -> Any:
    """One number of one gradient is Inf, in the only step of the round."""
    from resist_ds.engines import zero

    cross_entropy = zero.F.cross_entropy

    def spoilt(logits: Any, *args: Any, **kwargs: Any) -> Any:
        if zero_steps.pop():
            logits.register_hook(lambda grad: grad.index_fill(0, torch.tensor([0]), math.inf))
        return cross_entropy(logits, *args, **kwargs)

    zero_steps = [True, False]  # the first step is DeepSpeed's own, at learning rate 0
    zero.F = SimpleNamespace(cross_entropy=spoilt, pad=torch.nn.functional.pad)  # type: ignore[assignment]
    return outcome(comm, folder, options)


@pytest.mark.ranks
@pytest.mark.parametrize("stage", [0, 1, 3])
def test_a_bad_gradient_is_not_dropped_without_a_word(stage: int, ranks: Ranks, tmp_path: Path) -> None:
    """DeepSpeed leaves such a step out and goes on."""
    options: dict[str, Any] = {"workers": 1, "local_steps": 1, "output_dir": str(tmp_path / "r")}
    options["deepspeed_config"] = written(tmp_path, {"zero_optimization": {"stage": stage}})
    (found,) = ranks(spoils_a_gradient, 1, tmp_path, options)
    assert found.code == 3 and "worker 0 met NaN or Inf in round 1" in found.stderr
    assert not (tmp_path / "r" / "checkpoints").exists()


@pytest.mark.numerical
@pytest.mark.ranks
@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("stage", [1, 3])
def test_nan_in_an_engines_weights_is_never_saved(
    stage: int, momentum: float, ranks: Ranks, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"workers": 1, "lr": 3e38, "momentum": momentum, "local_steps": 1, "rounds": 1}
    options |= {"output_dir": str(tmp_path / "r"), "schedule": "constant", "weight_decay": 10.0}
    options["deepspeed_config"] = written(tmp_path, {"zero_optimization": {"stage": stage}})
    (found,) = ranks(outcome, 1, tmp_path, options)
    assert found.code == 3 and "met NaN or Inf in round 1" in found.stderr


@pytest.mark.numerical
@pytest.mark.ranks
@pytest.mark.parametrize("strategy", SPREAD)
def test_nan_is_never_saved(strategy: str, ranks: Ranks, tmp_path: Path) -> None:
    """A gradient that is Inf in a round's last step shows in no loss, only in the shards."""
    options = {
        "strategy": strategy,
        "workers": None,
        "lr": 1e38,
        "local_steps": 1,
        "output_dir": str(tmp_path / "r"),
    }
    first, _ = ranks(outcome, 2, tmp_path, options)
    assert first.code == 3 and "met NaN or Inf in round" in first.stderr
    for path in (tmp_path / "r").rglob("*.safetensors"):
        assert all(np.isfinite(array).all() for array in tensors(path.parent).values())


# ------------------------------------------------------------------------------------------------------------
# DeepSpeed inside ResIST.


@pytest.mark.numerical
@pytest.mark.ranks
@pytest.mark.parametrize(
    ("stage", "size", "options"),
    [
        (0, 2, {}),
        (0, 2, {"workers": 3, "accumulation_steps": 2, "clip_grad": 0.5, "nesterov": True, "batch_size": 16}),
        (1, 2, {"workers": 3}),
        (1, 2, {"optimizer_state": "reset", "min_blocks": 5}),
        (
            1,
            2,
            {"optimizer": "adamw", "lr": 1e-5, "weight_decay": 0.1, "min_blocks": 5}
            | {"betas": "0.8,0.99", "eps": 1e-3},
        ),
        (1, 2, {"offload": "cpu"}),
        (2, 2, {"workers": 3}),
        (3, 2, {"workers": 3}),
    ],
    ids=["0", "0-several-in-turn", "1-several-in-turn", "1-reset", "1-adamw", "1-offload", "2", "3"],
)
def test_sub_resnets_in_deepspeed_engines_are_the_simulation(
    stage: int, size: int, options: dict[str, Any], ranks: Ranks, tmp_path: Path
) -> None:
    """DeepSpeed knows no float64: the first three steps, with a synchronisation after each."""
    offload = {"offload_optimizer": {"device": options["offload"]}} if "offload" in options else {}
    file = written(tmp_path, {"zero_optimization": {"stage": stage, **offload}})
    three = {"dtype": "float32", "rounds": 3, "local_steps": 1, "eval_every": 0, "deepspeed_config": file}
    rest = {name: value for name, value in options.items() if name != "offload"}
    assert_agreement(ranks, size, tmp_path, 1e-4 if "optimizer" in options else 1e-5, **three | rest)


@pytest.mark.numerical
@pytest.mark.ranks
@pytest.mark.parametrize("stage", [1, 3])
def test_bf16_engines_average_fp32_masters(stage: int, ranks: Ranks, tmp_path: Path) -> None:
    """As near to the fp32 simulation as torch's autocast is, and with more bits than bf16's eight."""
    file = written(tmp_path, {"bf16": {"enabled": True}, "zero_optimization": {"stage": stage}})
    given = BASE | {"dtype": "float32", "workers": 2, "rounds": 2, "local_steps": 1, "batch_size": 64}
    given |= {"img_size": 16, "eval_every": 0, "output_dir": str(tmp_path)}
    expected = oracle.simulate(Config(**given)).state

    def error(**options: Any) -> float:
        off = []
        for rank in ranks(train, 2, Config(**given, mixed_precision="bf16", **options)):
            for name, found in rank["owned"].items():
                parameter = torch.from_numpy(found["parameter"])
                off.append((expected[name]["parameter"] - parameter).norm())
                assert parameter.ndim < 4 or not torch.equal(parameter, parameter.bfloat16().float()), name
        return float(torch.stack(off).norm())

    assert 0 < error(deepspeed_config=file) < 2 * error()


@pytest.mark.numerical
@pytest.mark.ranks
def test_one_rank_has_engines_too(ranks: Ranks, tmp_path: Path) -> None:
    """Without a launcher, so without any process group: resist in a DeepSpeed engine, zero3 and fsdp."""
    file = written(tmp_path, {"zero_optimization": {"stage": 1}})
    plain = RUN | {"workers": 2, "rounds": 2}
    ways: dict[str, dict[str, Any]] = {"plain": {"dtype": "float64"}, "inside": {"deepspeed_config": file}}
    for name, options in ways.items():
        ranks(saved.train, 1, plain | options | {"output_dir": str(tmp_path / name)})
    assert_the_same_training(tmp_path / "inside", tmp_path / "plain")
    for strategy in ("fsdp", "zero3"):
        options = RUN | {"rounds": 1, "strategy": strategy, "output_dir": str(tmp_path / strategy)}
        ranks(saved.train, 1, options)
        assert checkpoints(tmp_path / strategy) == ["round-000001"]


# ------------------------------------------------------------------------------------------------------------
# The DeepSpeed file.

FILE: dict[str, Any] = {
    "train_micro_batch_size_per_gpu": 4,
    "gradient_accumulation_steps": 8,
    "gradient_clipping": 0.5,
    "bf16": {"enabled": True},
    "optimizer": {
        "type": "SGD",
        "params": {"lr": 0.3, "momentum": 0.8, "weight_decay": 0.01, "nesterov": True},
    },
    "scheduler": {"type": "WarmupLR", "params": {"warmup_max_lr": "auto", "warmup_num_steps": 5}},
    "zero_optimization": {"stage": 1, "offload_optimizer": {"device": "cpu"}, "reduce_bucket_size": 1000},
    "steps_per_print": 7,
}


def test_a_file_says_what_options_say(tmp_path: Path) -> None:
    config = parse(["--deepspeed", "--deepspeed_config", written(tmp_path, FILE)])
    found = config.batch_size, config.accumulation_steps, config.clip_grad, config.mixed_precision
    assert found == (32, 8, 0.5, "bf16")
    assert (config.optimizer, config.lr, config.momentum) == ("sgd", 0.3, 0.8)
    assert (config.weight_decay, config.nesterov, config.schedule) == (0.01, True, "deepspeed")
    given = deepspeed_options.engine_options(config, ranks=1)
    assert given["train_micro_batch_size_per_gpu"] == 4 and given["gradient_accumulation_steps"] == 8
    assert given["zero_optimization"] == FILE["zero_optimization"] and given["bf16"] == {"enabled": True}
    assert given["gradient_clipping"] == 0.5 and given["steps_per_print"] == 7
    assert "optimizer" not in given and "scheduler" not in given
    scheduler = deepspeed_options.scheduler_of(config)
    assert scheduler == FILE["scheduler"]
    assert deepspeed_options.resolved(scheduler, config, steps=100) == {
        "type": "WarmupLR",
        "params": {"warmup_max_lr": 0.3, "warmup_num_steps": 5},
    }


def test_flags_that_say_the_same_are_allowed(tmp_path: Path) -> None:
    file = written(
        tmp_path, {"gradient_clipping": 0.5, "optimizer": {"type": "AdamW", "params": {"lr": "auto"}}}
    )
    config = parse(["--lr", "0.2", "--clip_grad", "0.5", "--deepspeed_config", file])
    assert (config.optimizer, config.lr, config.clip_grad) == ("adamw", 0.2, 0.5)


@pytest.mark.parametrize(
    ("content", "flags", "message"),
    [
        (
            {"gradient_clipping": 0.5},
            ["--clip_grad=1"],
            "gradient_clipping makes --clip_grad 0.5, and --clip_grad is 1.0",
        ),
        ({"bf16": {"enabled": True}}, ["--mixed_precision=no"], "bf16.enabled makes --mixed_precision bf16"),
        ({"bf16": {"enabled": True}}, [], "bf16 keeps fp32 masters from zero_optimization.stage 1 on"),
        (
            {"train_micro_batch_size_per_gpu": 4},
            ["--batch_size=8"],
            "makes --batch_size 4, and --batch_size is 8",
        ),
        ({"gradient_accumulation_steps": 2}, ["--accumulation_steps=4"], "makes --accumulation_steps 2"),
        ({"optimizer": {"type": "Lamb"}}, [], 'optimizer.type is "Lamb": write SGD, Adam or AdamW'),
        (
            {"optimizer": {"type": "SGD", "params": {"lr": 0.1}}},
            ["--lr=0.2"],
            "optimizer.params.lr makes --lr 0.1",
        ),
        (
            {"optimizer": {"type": "SGD", "params": {"betas": [0.9, 0.99]}}},
            [],
            "optimizer.params.betas cannot be honoured",
        ),
        ({"optimizer": {"type": "SGD", "params": {"foo": 1}}}, [], "optimizer.params.foo cannot be honoured"),
        ({"scheduler": {"type": "Cosine"}}, [], 'scheduler.type is "Cosine": write one of WarmupLR'),
        (
            {"scheduler": {"type": "WarmupLR"}},
            ["--schedule=cosine"],
            "scheduler.type makes --schedule deepspeed",
        ),
        ({"fp16": {"enabled": True}}, [], "fp16 cannot be honoured"),
        ({"zero_optimization": {"stage": 4}}, [], "zero_optimization.stage is 4: write 0, 1, 2 or 3"),
        (
            {"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}}},
            [],
            'zero_optimization.offload_param.device "cpu" cannot be honoured: write none',
        ),
        (
            {"zero_optimization": {"offload_optimizer": {"device": "nvme"}}},
            [],
            'offload_optimizer.device "nvme"',
        ),
        ({"zero_optimization": {"stage": 1}}, ["--dtype=float64"], "DeepSpeed computes in float32"),
        (
            {"zero_optimization": {"stage": 1}},
            ["--strategy=zero2"],
            "stage is 1, and --strategy zero2 is ZeRO 2",
        ),
        ({"zero_optimization": []}, [], "zero_optimization is []: write an object"),
        ({"gradient_clipping": "much"}, [], 'gradient_clipping is "much": write a number, or auto'),
        ({"flops_profiler": {"enabled": True}}, [], "flops_profiler cannot be honoured: leave it out"),
        ([], [], "is no JSON object"),
        (
            {},
            ["--strategy=ddp"],
            "--deepspeed_config is for --strategy resist and zero1 to zero3, not for ddp",
        ),
        ({"bf16": {"enabled": False}}, ["--mixed_precision=bf16"], "bf16.enabled makes --mixed_precision no"),
        ({"bf16": {"enabled": "false"}}, [], 'bf16.enabled is "false": write true, false or auto'),
        (
            {"gradient_accumulation_steps": 2.5},
            [],
            "gradient_accumulation_steps is 2.5: write a whole number",
        ),
        (
            {"optimizer": {"type": "SGD", "params": {"nesterov": "no"}}},
            [],
            'nesterov is "no": write true, false',
        ),
        (
            {"scheduler": {"type": "WarmupLR", "params": 5}},
            [],
            "scheduler.params is 5: write an object",
        ),
        ({"scheduler": {"type": "OneCycle"}}, [], 'scheduler.type is "OneCycle": write one of WarmupLR'),
        (
            {"scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 5}}},
            ["--lr_warmup_steps=3"],
            "scheduler.params.warmup_num_steps decides, and --lr_warmup_steps is 3",
        ),
        ({}, ["--schedule=deepspeed"], "needs a scheduler in it: write one, or type another schedule"),
        (
            {"zero_optimization": {"reduce_bucket_size": "big"}},
            [],
            'reduce_bucket_size is "big": write a whole number',
        ),
        ({"steps_per_print": True}, [], "steps_per_print is true: write a whole number"),
        (
            {"managed_gradient_accumulation": False},
            [],
            "managed_gradient_accumulation false cannot be honoured: it is true here",
        ),
        (
            {"zero_optimization": {"stage": 0, "offload_optimizer": {"device": "cpu"}}},
            [],
            "offload_optimizer at stage 0 cannot be honoured",
        ),
        (
            {},
            ["--warmup_rounds=2"],
            "--warmup_rounds is not for --deepspeed_config, whose engines keep their size",
        ),
        ({}, ["--deepspeed=a.json"], "--deepspeed takes no value, and 'a.json' is one"),
        ({}, ["--compile"], "--compile is not for FSDP2 and DeepSpeed here"),
        ({}, ["--mixed_precision=fp16"], "--mixed_precision fp16 is not for FSDP2 and DeepSpeed here"),
    ],
)
def test_what_cannot_be_honoured_is_named(
    content: object, flags: list[str], message: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError) as raised:
        parse(["--deepspeed_config", written(tmp_path, content), *flags])
    said = str(raised.value)
    assert message in said and "\n" not in said
    assert "deepspeed.json" in said or message.startswith("--")


def test_auto_is_what_the_options_say(tmp_path: Path) -> None:
    auto = {"fp16": {"enabled": "auto"}, "bf16": {"enabled": "auto"}, "steps_per_print": "auto"}
    file = written(
        tmp_path, auto | {"train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": "auto"}
    )
    config = parse(["--accumulation_steps", "2", "--deepspeed_config", file])
    assert (config.batch_size, config.accumulation_steps, config.mixed_precision) == (8, 2, "no")
    assert isinstance(deepspeed_options.engine_options(config, 1)["steps_per_print"], int)


def test_null_on_the_command_line_leaves_a_file_out(tmp_path: Path) -> None:
    preset = tmp_path / "preset.yaml"
    preset.write_text(f"deepspeed_config: {written(tmp_path, FILE)}\n")
    assert parse(["--config", str(preset)]).lr == 0.3
    assert parse(["--config", str(preset), "--deepspeed_config", "null"]).lr == Config.default("lr")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--deepspeed"], "--deepspeed needs a file: type --deepspeed_config FILE.json"),
        (
            ["--deepspeed_config", "nowhere.json"],
            "--deepspeed_config nowhere.json cannot be read: No such file",
        ),
        (["--deepspeed_config", __file__], "is not JSON: "),
        (
            ["--schedule", "deepspeed"],
            "--schedule deepspeed needs a --deepspeed_config with a scheduler in it",
        ),
        (
            ["--strategy", "stochastic_depth"],
            "runs --min_blocks random pool blocks a step: type their number",
        ),
        (["--compile_mode", "reduce-overhead"], "--compile_mode reduce-overhead is for --compile true"),
        (
            ["--compile", "--compile_mode", "max-autotune", "--accumulation_steps", "2"],
            "--compile_mode max-autotune cannot add up gradients: type --accumulation_steps 1",
        ),
        (["--strategy", "zero1", "--optimizer_state", "reset"], "reset is not for --strategy zero1"),
        (["--strategy", "fsdp", "--on_nan", "skip"], "--on_nan skip is not for --strategy fsdp"),
        (["--strategy", "zero3", "--dtype", "float64"], "--strategy zero3 computes in float32"),
        (["--strategy", "fsdp", "--min_blocks", "3"], "--min_blocks is for --strategy resist"),
        (["--strategy", "fsdp", "--channels_last"], "--channels_last is not for FSDP2 and DeepSpeed here"),
    ],
)
def test_wrong_calls(argv: list[str], message: str) -> None:
    with pytest.raises(UserError) as raised:
        parse(argv)
    assert message in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.ranks
def test_a_total_batch_that_the_ranks_do_not_make(ranks: Ranks, tmp_path: Path) -> None:
    file = written(tmp_path, {"train_batch_size": 64, "zero_optimization": {"stage": 1}})
    options = {
        "strategy": "zero1",
        "workers": None,
        "deepspeed_config": file,
        "output_dir": str(tmp_path / "r"),
    }
    first, second = ranks(outcome, 2, tmp_path, options)
    assert (first.code, second) == (2, (2, ""))
    assert "train_batch_size is 64, and 2 × --batch_size 8 is 16: leave it out" in first.stderr


def defaults(model: Any) -> dict[str, Any]:
    """A section of a DeepSpeed file in which every field stands as DeepSpeed has it anyway."""
    fields = model.model_fields.items()  # leaf_module's default is a list of classes in transformers
    found = {f.alias or n: f.get_default(call_default_factory=True) for n, f in fields if n != "leaf_module"}
    return dict(json.loads(json.dumps(found)))


def test_deepspeeds_own_defaults_ask_for_nothing(tmp_path: Path) -> None:
    """What we know of its fields (their names, types, limits and defaults) is what the installed one says."""
    from deepspeed.comm.config import CommsLoggerConfig
    from deepspeed.compile.config import CompileConfig
    from deepspeed.monitor import config as monitor
    from deepspeed.runtime import constants, precision_config
    from deepspeed.runtime.activation_checkpointing.config import ACT_CHKPT, ACT_CHKPT_DEFAULT
    from deepspeed.runtime.config import HybridEngineConfig
    from deepspeed.runtime.swap_tensor.aio_config import AIO_DEFAULT_DICT
    from deepspeed.runtime.zero import offload_config
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    assert constants.GRADIENT_CLIPPING_DEFAULT == 1.0  # always given by us, who clip only where asked to
    decided = {constants.GRADIENT_CLIPPING}
    names = [name.removesuffix("_DEFAULT") for name in vars(constants) if name.endswith("_DEFAULT")]
    names = [name for name in names if hasattr(constants, name)]
    top = {getattr(constants, name): getattr(constants, f"{name}_DEFAULT") for name in names}
    inner = ("FP16_", "BFLOAT16_", "TORCH_AUTOCAST_", "CHECKPOINT_", "LEGACY_FUSION", "KEEP_IN_FP32")
    inside = {getattr(constants, name) for name in names if name.startswith(inner)}
    file: dict[str, Any] = {name: value for name, value in top.items() if name not in inside | decided}
    assert len(file) > 15
    offload = defaults(offload_config.DeepSpeedZeroOffloadOptimizerConfig)
    zero = defaults(DeepSpeedZeroConfig) | {
        "stage": 3,
        "offload_param": defaults(offload_config.DeepSpeedZeroOffloadParamConfig),
        "offload_optimizer": offload | {"device": "cpu"},
    }
    file |= {
        "zero_optimization": zero,
        "aio": AIO_DEFAULT_DICT,
        "bf16": defaults(precision_config.DeepSpeedBF16Config),
        "comet": defaults(monitor.CometConfig),
        "comms_logger": defaults(CommsLoggerConfig),
        "compile": defaults(CompileConfig),
        "csv_monitor": defaults(monitor.CSVConfig),
        "fp16": defaults(precision_config.DeepSpeedFP16Config),
        "hybrid_engine": defaults(HybridEngineConfig),
        "tensorboard": defaults(monitor.TensorBoardConfig),
        "wandb": defaults(monitor.WandbConfig),
        ACT_CHKPT: ACT_CHKPT_DEFAULT,
    }
    named = written(tmp_path, file)
    config = parse(["--deepspeed_config", named])
    assert config == Config(deepspeed_config=named, mixed_precision="no")
    given = DeepSpeedZeroConfig(**deepspeed_options.engine_options(config, 1)["zero_optimization"])
    for name, (kind, least) in ZERO_PASSED_ON.items():
        field = next(f for n, f in DeepSpeedZeroConfig.model_fields.items() if name in (n, f.alias))
        assert kind in (field.annotation, *typing.get_args(field.annotation)), name
        limits = [m.ge if hasattr(m, "ge") else m.gt + 1 for m in field.metadata]
        assert limits in ([least], []), name
    assert given.stage == 3 and given.offload_optimizer.device == "cpu" and given.reduce_bucket_size == 5e8


@pytest.mark.ranks
def test_hugging_faces_template_trains_at_one_rate(ranks: Ranks, tmp_path: Path) -> None:
    """ "auto" throughout, and no warm-up typed: there is none."""
    scheduler = {"type": "WarmupLR", "params": {"warmup_max_lr": "auto", "warmup_num_steps": "auto"}}
    content = {
        "optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": "auto", "eps": "auto"}},
        "scheduler": scheduler,
        "zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu", "pin_memory": True}},
        "train_batch_size": "auto",
    }
    options = RUN | {"workers": 1, "rounds": 1, "optimizer": "adamw", "lr": 1e-3, "schedule": "deepspeed"}
    options |= {"deepspeed_config": written(tmp_path, content), "output_dir": str(tmp_path / "r")}
    ranks(saved.train, 1, options)
    assert [line["lr"] for line in loss_log(tmp_path / "r") if line["kind"] == "round"] == [1e-3]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("WarmupLR", [1.0] * 6),
        ("WarmupDecayLR", [1.0, 1.0, 0.75, 0.5, 0.25, 0.0]),
        # half a cosine over 4 steps, of which DeepSpeed leaves out the first
        ("WarmupCosineLR", [0.5 + 0.5 * math.cos(math.pi * i / 4) for i in (1, 1, 2, 3, 4, 4)]),
    ],
)
def test_a_scheduler_without_warm_up_starts_at_the_top(name: str, expected: list[float]) -> None:
    config = Config(lr=0.5)
    params = dict.fromkeys(("warmup_num_steps", "warmup_type"), "auto")
    total = {} if name == "WarmupLR" else {"total_num_steps": "auto"}
    lowest = {"cos_min_ratio": 0} if name == "WarmupCosineLR" else {}
    found = deepspeed_options.resolved({"type": name, "params": params | total | lowest}, config, steps=4)
    rate = deepspeed_schedule(found["type"], found["params"], config.lr)
    top = 0.5 if name != "WarmupDecayLR" else 0.001  # DeepSpeed's own, where the file says none
    assert [rate(step) / top for step in range(6)] == pytest.approx(expected)


def test_deepspeeds_schedulers_give_the_rates() -> None:
    rate = deepspeed_schedule(
        "WarmupLR", {"warmup_max_lr": 0.5, "warmup_num_steps": 10, "warmup_type": "linear"}, 0.5
    )
    assert [rate(s) for s in (1, 6, 11, 50)] == pytest.approx([0.0, 0.25, 0.5, 0.5])
    with pytest.raises(UserError, match=r"scheduler.params: .*no_such"):
        deepspeed_schedule("WarmupLR", {"no_such": 1}, 0.5)


def trains_while_the_file_goes(comm: Comm, options: dict[str, Any]) -> None:
    """The file is deleted once the run is set up."""
    trainer = Trainer(comm, Config(**(OPTIONS | options)))
    Path(options["deepspeed_config"]).unlink()
    trainer.run()
    trainer.folder.release()


@pytest.mark.ranks
def test_a_file_that_goes_during_a_run_is_not_missed(ranks: Ranks, tmp_path: Path) -> None:
    """It is read at the start; checkpoints keep what it said."""
    scheduler = {"type": "WarmupLR", "params": {"warmup_max_lr": 0.1, "warmup_num_steps": 4}}
    options = RUN | {"workers": 2, "rounds": 2, "schedule": "deepspeed", "checkpoint_every": 1}
    options |= {
        "output_dir": str(tmp_path / "r"),
        "deepspeed_config": written(tmp_path, {"scheduler": scheduler}),
    }
    ranks(trains_while_the_file_goes, 1, options)
    for name in checkpoints(tmp_path / "r"):
        state = json.loads((tmp_path / "r" / "checkpoints" / name / "state.json").read_text())
        assert state["config"]["scheduler"] == scheduler


@pytest.mark.ranks
def test_a_run_follows_the_files_scheduler(ranks: Ranks, tmp_path: Path) -> None:
    params = {"warmup_min_lr": 0, "warmup_max_lr": 0.1, "warmup_num_steps": "auto", "warmup_type": "linear"}
    content = {"scheduler": {"type": "WarmupDecayLR", "params": params | {"total_num_steps": "auto"}}}
    options = RUN | {
        "workers": 2,
        "schedule": "deepspeed",
        "lr_warmup_steps": 4,
        "output_dir": str(tmp_path / "r"),
    }
    ranks(saved.train, 1, options | {"deepspeed_config": written(tmp_path, content)})
    state = json.loads((last(tmp_path / "r") / "state.json").read_text())
    assert "deepspeed_config" not in state["config"]  # no path; but what it said of the learning rate:
    assert state["config"]["scheduler"] == content["scheduler"]
    rates = [line["lr"] for line in loss_log(tmp_path / "r") if line["kind"] == "round"]
    # The rate of a round's last step: steps 1, 3, 5, 7 and 9 of 10, after four of warm-up.
    assert rates == pytest.approx([0.0, 0.05, 0.1, 0.1 * 4 / 6, 0.1 * 2 / 6], abs=1e-6)
    content["scheduler"]["params"]["warmup_max_lr"] = 5.0
    goes_on = {"resume": "auto", "override": "rounds", "rounds": 6}
    (found,) = ranks(
        outcome, 1, tmp_path, options | goes_on | {"deepspeed_config": written(tmp_path, content)}
    )
    assert found.code == 2 and "another scheduler than that of the checkpoint's run" in found.stderr


# ------------------------------------------------------------------------------------------------------------
# Stochastic depth.


def depth_run(comm: Comm, options: dict[str, Any]) -> dict[str, Any]:
    """Which pool blocks ran in each step, and what the run came to."""
    trainer = Trainer(comm, Config(**(OPTIONS | options)))
    engine = trainer.workers.engine
    assert isinstance(engine, RandomDepth)
    ran: list[list[int]] = []
    for b, block in enumerate(engine._blocks):
        block.conv1.register_forward_hook(
            lambda *_, b=b: ran[-1].append(b) if engine.subnet.module.training else None
        )
    step = engine.step

    def noted(*args: Any) -> Any:
        ran.append([])
        return step(*args)

    engine.step = noted  # type: ignore[method-assign]
    trainer.run()
    trainer.folder.release()
    return {
        "ran": ran,
        "scale": json.loads((last(trainer.folder.path) / "state.json").read_text())["test_scale"],
    }


@pytest.mark.numerical
@pytest.mark.ranks
def test_stochastic_depth_runs_k_random_blocks_a_step(ranks: Ranks, tmp_path: Path) -> None:
    options = RUN | {"strategy": "stochastic_depth", "min_blocks": 3, "output_dir": str(tmp_path / "whole")}
    (found,) = ranks(depth_run, 1, options)
    pool = Blueprint(OPTIONS["model"], 10).pool
    assert found["scale"] == 3 / pool
    expected = [
        list(sample_partition(0, s, workers=math.ceil(pool / 3), pool=pool, min_blocks=3).blocks[0])
        for s in range(10)
    ]
    assert found["ran"] == expected
    assert len({tuple(blocks) for blocks in expected}) > 5
    # A resumed run draws on; recomputation in the backward pass sees the same blocks.
    place = {"output_dir": str(tmp_path / "run"), "activation_checkpointing": True}
    ranks(saved.train, 1, options | place | {"rounds": 3})
    ranks(saved.train, 1, options | place | {"resume": "auto", "override": "rounds"})
    assert digest(last(tmp_path / "run")) == digest(last(tmp_path / "whole"))


@pytest.mark.ranks
def test_stochastic_depth_has_one_worker(ranks: Ranks, tmp_path: Path) -> None:
    options = {
        "strategy": "stochastic_depth",
        "min_blocks": 3,
        "workers": 2,
        "output_dir": str(tmp_path / "r"),
    }
    (found,) = ranks(outcome, 1, tmp_path, options)
    line = "error: --strategy stochastic_depth has one worker: type --workers 1, and start one rank\n"
    assert found == (2, line)
