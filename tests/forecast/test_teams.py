"""What is predicted of teams, beside what their runs count."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from resist_ds.comm import Comm
from resist_ds.forecast.plan import Plan, Question, expected
from resist_ds.forecast.traffic import sent_inside
from resist_ds.nets.blueprint import Blueprint
from resist_ds.options.config import Config
from resist_ds.protocol.partition import Layout
from resist_ds.trainer import Trainer
from tests.conftest import Ranks
from tests.protocol.test_oracle import BASE

TEAMS: dict[str, Any] = {**BASE, "workers": 2, "team_size": 2, "dtype": "float32", "eval_every": 0}
NARROW = "preact_resnet101_narrow"


def run(comm: Comm, options: dict[str, Any]) -> None:
    trainer = Trainer(comm, Config(**options))
    trainer.run()
    trainer.folder.release()


@pytest.mark.ranks
@pytest.mark.parametrize("way", ["ddp", "fsdp"])
def test_bytes_are_those_of_the_ledger(way: str, ranks: Ranks, tmp_path: Path) -> None:
    """To the byte, but for rows of FSDP2's that do not divide: those between are padded and not predicted."""
    options = TEAMS | {"team_strategy": way, "rounds": 3, "output_dir": str(tmp_path)}
    ranks(run, 4, options)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    rounds = [line for line in lines if line["kind"] == "round"]
    config, blueprint = Config(**options), Blueprint(TEAMS["model"], 10)
    inside = sent_inside(blueprint, config, workers=2, slots=4, steps=config.local_steps)
    assert [r["comm/bytes_team"] for r in rounds] == [inside] * 3
    found = expected(blueprint, config, 4, 4, Layout(2, 4, 2), 8, "cpu")
    assert found.inside == inside
    mean = sum(r["comm/bytes_round"] for r in rounds) / 3
    assert found.sent == pytest.approx(mean, rel=0.1)  # of three deals, and of twenty


def plan_of(config: Config, workers: tuple[int, ...] = (2,)) -> Plan:
    blueprint = Blueprint(config.model, 10)
    return Plan(Question(blueprint, config, 32, workers, 1e9, float(1 << 30), device="cpu"))


def test_memory_is_shared_where_the_strategy_shares_it() -> None:
    """Weights, gradients and optimizer state; and every rank has its part of the images."""
    config = Config(model=NARROW, batch_size=64)
    alone = plan_of(replace(config, batch_size=16)).predict("resist", 2)
    for way, shared in (("ddp", (1, 1, 1)), ("fsdp", (4, 4, 4)), ("zero2", (1, 4, 2)), ("zero3", (4, 4, 2))):
        found = plan_of(replace(config, team_size=4, team_strategy=way)).predict("resist", 2)
        for name, times in zip(("weights", "gradients", "optimizer"), shared, strict=True):
            # DeepSpeed's second copy of the weights counts as optimizer state
            assert getattr(found, name) == pytest.approx(getattr(alone, name) / times, rel=0.01), (way, name)
        assert found.activations == pytest.approx(alone.activations, rel=0.01)
        assert found.multiply_adds == alone.multiply_adds
        assert found.sent_round == alone.sent_round and found.sent_team > 0
        assert (found.sharing, found.parameters < alone.parameters) == (way, way in ("fsdp", "zero3"))
    # Strategies in lockstep then share the same images over all ranks.
    ddp = plan_of(replace(config, team_size=4)).predict("ddp", 2)
    assert ddp.multiply_adds == plan_of(replace(config, batch_size=16)).predict("ddp", 8).multiply_adds
    assert ddp.sent_step == plan_of(replace(config, batch_size=16)).predict("ddp", 8).sent_step
