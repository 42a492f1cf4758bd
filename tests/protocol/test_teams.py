"""Teams: ranks that share each step of a worker, against the oracle, against each other, and to the byte."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from resist_ds.comm import Comm
from resist_ds.nets.blueprint import Blueprint
from resist_ds.nets.subnet import StateLayout
from resist_ds.options.config import Config
from resist_ds.protocol.sync import MEAN_CHUNK
from resist_ds.trainer import Trainer
from tests.conftest import Ranks
from tests.oracle import arrays
from tests.protocol.test_oracle import BASE, HIDDEN, assert_agreement, train
from tests.saved import checkpoints, tensors
from tests.telemetry.test_memory import watched

pytestmark = [pytest.mark.ranks, pytest.mark.numerical]

FSDP = {"team_strategy": "fsdp"}
# {case: (ranks, options)}; a team's batch is that of one rank in as many micro-batches as it has ranks.
CASES: dict[str, tuple[int, dict[str, Any]]] = {
    "two workers": (4, {"workers": 2, "team_size": 2, "channels_last": True}),
    "three teams": (6, {"workers": 3, "team_size": 2, "batch_size": 16, "rounds": 2}),
    "more workers than teams": (4, {"workers": 3, "team_size": 2, "min_blocks": 5}),
    "one team of three": (3, {"workers": 2, "team_size": 3, "batch_size": 24, "rounds": 2}),
    "micro-batches": (4, {"workers": 2, "team_size": 2, "accumulation_steps": 2, "batch_size": 16}),
    "hidden": (
        4,
        HIDDEN | {"workers": 3, "team_size": 2, "warmup_rounds": 2, "rounds": 4, "clip_grad": 0.5},
    ),
    "hidden in one team": (2, HIDDEN | {"workers": 3, "team_size": 2, "rounds": 4}),
    "fsdp": (4, FSDP | {"workers": 3, "team_size": 2, "nesterov": True, "clip_grad": 0.5}),
    "fsdp hidden": (
        4,
        FSDP | HIDDEN | {"workers": 2, "team_size": 2, "warmup_rounds": 1, "rounds": 3, "batch_size": 16},
    ),
    "fsdp adamw": (
        4,
        FSDP
        | {
            "workers": 2,
            "team_size": 2,
            "optimizer": "adamw",
            "lr": 1e-3,
            "eps": 1e-3,
            "accumulation_steps": 2,
        }
        | {"batch_size": 16},
    ),
    # Rows that do not divide: 8 and 16 channels and 10 classes among three.
    "fsdp of three": (3, FSDP | {"workers": 2, "team_size": 3, "batch_size": 24, "rounds": 2}),
}


@pytest.mark.parametrize("case", CASES)
def test_a_team_trains_as_one_rank_in_micro_batches(case: str, ranks: Ranks, tmp_path: Path) -> None:
    size, options = CASES[case]
    assert_agreement(ranks, size, tmp_path, 1e-10, **options)


def test_how_ranks_share_a_step_changes_nothing_but_rounding(ranks: Ranks, tmp_path: Path) -> None:
    """Ten steps over two rounds in float32: what four ways inside a team come to, against ddp."""
    found = {}
    for way in ("ddp", "fsdp", "zero1", "zero2", "zero3"):
        options = {"workers": 3, "team_size": 2, "team_strategy": way, "dtype": "float32", "rounds": 2}
        options |= {"local_steps": 5, "batch_size": 16, "lr": 0.01, "eval_every": 0, "min_blocks": 4}
        config = Config(**{**BASE, **options, "output_dir": str(tmp_path / way)})
        found[way] = {name: of for rank in ranks(train, 4, config) for name, of in rank["owned"].items()}
    first = {name: of["parameter"] for name, of in found["ddp"].items()}
    for way, state in found.items():
        assert state.keys() == first.keys()
        for name, of in state.items():
            for kind, value in of.items():
                want = found["ddp"][name][kind]
                error = np.linalg.norm(value - want) / max(float(np.linalg.norm(want)), 1e-9)
                assert error <= 1e-4, f"{way}: {kind} of {name} is off by {error:.1e} of its norm"


def owned_after(comm: Comm, options: dict[str, Any]) -> dict[str, Any]:
    """A run, and what this rank owns at its end."""
    trainer = Trainer(comm, Config(**options))
    try:
        trainer.run()
        return arrays(trainer.workers.owned(trainer.net.deal))
    finally:
        trainer.folder.release()


CHAIN: tuple[tuple[int, int, int, str], ...] = (  # W, G, R and how
    (2, 2, 4, "ddp"),
    (3, 1, 3, "ddp"),
    (2, 2, 4, "fsdp"),
    (2, 1, 1, "ddp"),
    (3, 2, 4, "zero2"),
    (2, 2, 4, "ddp"),
)


def test_without_a_learning_rate_a_chain_of_teams_keeps_every_bit(ranks: Ranks, tmp_path: Path) -> None:
    """Through checkpoints, on other numbers of workers, teams and ranks."""
    initial = Blueprint(BASE["model"], 10)
    wanted = dict(initial.initial_shared(0))
    for block in range(initial.pool):
        prefix = initial.block_prefix(block)
        wanted |= {prefix + name: value for name, value in initial.initial_block(0, block).items()}
    momentum = 0
    for i, (workers, size, number, way) in enumerate(CHAIN, start=1):
        options = {
            **BASE,
            "lr": 0.0,
            "weight_decay": 0.0,
            "dtype": "float32",
            "rounds": i,
            "workers": workers,
        }
        options |= {"team_size": size, "team_strategy": way, "local_steps": 2, "eval_every": 0}
        options |= {"resume": "auto", "override": "rounds,batch_size", "output_dir": str(tmp_path)}
        found = ranks(owned_after, number, options)
        state = {name: of for rank in found for name, of in rank.items()}
        assert state.keys() == wanted.keys() and sum(map(len, found)) == len(state)
        for name, of in state.items():
            np.testing.assert_array_equal(
                of["parameter"].view(np.uint32), wanted[name].numpy().view(np.uint32), f"{way}: {name}"
            )
            momentum += int(of["momentum_buffer"].any())
    assert momentum, "nothing was trained"


@pytest.mark.parametrize("way", ["ddp", "fsdp"])
def test_without_a_learning_rate_the_compact_wire_changes_no_bit_after_its_first_round(
    way: str, ranks: Ranks, tmp_path: Path
) -> None:
    """That makes blocks bf16, each number one of its two neighbours; and leaves shared as it was."""
    options = {**BASE, "lr": 0.0, "weight_decay": 0.0, "dtype": "float32", "wire": "compact", "workers": 3}
    options |= {"rounds": 3, "local_steps": 2, "min_blocks": 5, "eval_every": 0, "checkpoint_minutes": 0.0}
    options |= {
        "checkpoint_every": 0,
        "overlap_steps": 1,
        "team_size": 2,
        "team_strategy": way,
        "batch_size": 16,
    }
    ranks(owned_after, 4, options | {"output_dir": str(tmp_path)})
    first, *others = (tensors(tmp_path / "checkpoints" / name) for name in checkpoints(tmp_path))
    assert len(others) == 2
    blueprint = Blueprint(BASE["model"], 10)
    shared = dict(blueprint.initial_shared(0))
    initial = shared | {
        blueprint.block_prefix(block) + name: value
        for block in range(blueprint.pool)
        for name, value in blueprint.initial_block(0, block).items()
    }
    for name, value in initial.items():
        for other in others:
            np.testing.assert_array_equal(other[name].view(np.uint32), first[name].view(np.uint32), name)
        got = torch.from_numpy(first[name])
        if name in shared or value.ndim == 1:
            assert torch.equal(got, value), name
        else:
            assert torch.equal(got, got.bfloat16().float()) and not torch.equal(got, value), name
            assert ((got - value).abs() <= value.abs() / 128).all(), name
    momentum = "stages.2.blocks.1.conv1.weight.momentum_buffer"
    assert others[-1][momentum].any() and not np.array_equal(first[momentum], others[-1][momentum])


@pytest.mark.parametrize("wire", ["exact", "compact"])
def test_between_teams_goes_what_goes_between_ranks(wire: str, ranks: Ranks, tmp_path: Path) -> None:
    """To the byte; and inside teams a ring's share of the gradients, and the slices that lanes bring."""
    options = {**BASE, "workers": 2, "dtype": "float32", "wire": wire, "rounds": 2, "eval_every": 0}
    rounds = {}
    for size, number in ((1, 2), (2, 4)):
        folder = tmp_path / str(size)
        ranks(owned_after, number, options | {"team_size": size, "output_dir": str(folder)})
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        rounds[size] = [line for line in lines if line["kind"] == "round"]
    assert [r["comm/bytes_round"] for r in rounds[2]] == [r["comm/bytes_round"] for r in rounds[1]]
    assert all("comm/bytes_team" not in r for r in rounds[1])
    config = Config(**{**options, "output_dir": str(tmp_path)})
    blueprint = Blueprint(config.model, 10)
    state = StateLayout.of(blueprint, config, slots=4)
    gradients = 4 * blueprint.parameters_held(4)  # both lanes of a ring of two send each half of them twice
    per_team = config.local_steps * 2 * gradients + 4 * state.numel
    assert [r["comm/bytes_team"] for r in rounds[2]] == [2 * per_team] * 2


def test_a_team_s_fsdp_holds_its_share(ranks: Ranks, tmp_path: Path) -> None:
    """Training state of a rank, counted: half of one alone, but for rows that do not divide; at no time more
    than in training, nor than one alone has. (An evaluation needs shared whole, a save what the rank writes.)
    """
    options = {**BASE, "workers": 2, "dtype": "float32", "rounds": 2, "local_steps": 1, "eval_every": 1}
    options |= {"batch_size": 16, "checkpoint_every": 1}
    alone, _ = ranks(held_at_most, 2, options | {"output_dir": str(tmp_path / "alone")})
    team = {"team_size": 2, "team_strategy": "fsdp", "output_dir": str(tmp_path / "team")}
    for held in ranks(held_at_most, 4, options | team):
        assert held.keys() == alone.keys() == {"state", "local", "sync", "eval", "save"}
        assert held["state"] <= 0.52 * alone["state"]
        assert max(held.values()) == held["local"], held
        assert all(held[phase] <= alone[phase] for phase in ("local", "sync", "eval")), (held, alone)
        transit = options["transit_mib"] << 20
        assert held["sync"] <= held["state"] + transit + 8 * MEAN_CHUNK


def held_at_most(comm: Comm, options: dict[str, Any]) -> dict[str, int]:
    """Bytes under a rank's parameters and optimizer state, and of all tensors at the peak of each phase."""
    trainer = Trainer(comm, Config(**options))
    peaks = watched(trainer)
    trainer.run()
    trainer.folder.release()
    engine = trainer.workers.engine
    state = [p.detach() for p in engine._parameters]
    state += [t for of in engine.optimizer.state.values() for t in of.values()]
    local = [t.to_local() if hasattr(t, "to_local") else t for t in state]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in local}
    vectors = {
        v.untyped_storage().data_ptr(): v.untyped_storage().nbytes() for v in trainer.workers.vectors.values()
    }
    return {"state": sum((storages | vectors).values()), **peaks}
