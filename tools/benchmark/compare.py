"""Runs of several strategies, in turn and repeated: what each run's own records say of it.

All run in the same trainer on the same synthetic images, each run in fresh processes. Every repeat has
another seed, and runs the strategies in the opposite order, so that a machine that slows down slows down all.
"""

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from resist_ds.comm import Comm
from resist_ds.errors import RunError, Stopped, UserError
from resist_ds.options.config import Config
from tools.benchmark import counted, limits, link, ranks
from tools.benchmark.asked import ONCE_A_ROUND, of_strategy

GIB = 1 << 30


@dataclass(frozen=True)
class Plan:
    """What is to be compared.

    Attributes:
        config: of every run, but for strategy and seed; its `cpu_threads` are fixed.
        strategies: in the order of the first repeat.
        ranks: R.
        network: where the ranks live, or None: on this machine's own network.
        folder: for the runs' folders.
        timeout: seconds for one run.
    """

    config: Config
    strategies: tuple[str, ...]
    ranks: int
    repeats: int
    network: link.Link | None
    folder: Path
    timeout: float

    @property
    def workers(self) -> int:
        assert self.config.workers is not None
        return self.config.workers

    @property
    def played(self) -> int:
        """Workers that a rank plays at most."""
        return -(-self.workers // self.ranks)

    def config_of(self, strategy: str, repeat: int) -> Config:
        return replace(of_strategy(self.config, strategy), seed=self.config.seed + repeat)

    def start(
        self, function: Callable[..., Any], *args: Any, size: int | None = None, name: str
    ) -> list[Any]:
        """Call `function` on fresh ranks. A failure names `name` and where the ranks' own words are."""
        log = self.folder / name
        shutil.rmtree(log, ignore_errors=True)
        log.mkdir(parents=True)
        size = size or self.ranks
        try:
            return ranks.run(function, size, *args, network=self.network, log=log, timeout=self.timeout)
        except (UserError, Stopped):
            raise
        except RunError as error:
            raise RunError(f"{name}: {error}; see {log}/rank*.log") from None


def measure(plan: Plan, say: Callable[[str], None]) -> dict[str, Any]:
    """All runs and limits; the raw figures, as they are saved. `say` tells how far it is."""
    configs = {s: [plan.config_of(s, repeat) for repeat in range(plan.repeats)] for s in plan.strategies}
    facts = plan.start(counted.facts, configs, size=1, name="facts")[0]
    measured: dict[str, Any] = {"facts": facts, "link": None, "runs": []}
    if plan.network is not None:
        measured["link"] = _measure_link(plan)
        say(f"link: {min(measured['link']['mbit_per_s']):.0f} Mbit/s each way, measured")
    for repeat in range(plan.repeats):
        for strategy in plan.strategies if repeat % 2 == 0 else plan.strategies[::-1]:
            run = _run(plan, strategy, repeat)
            run["bare"] = _bare(plan, run, facts["strategies"][strategy]["slots"])
            measured["runs"].append(run)
            speed = f"{run['samples_per_s']:.1f} samples/s"
            say(f"repeat {repeat + 1} of {plan.repeats}: {strategy} {speed}")
    memory: dict[str, Any] = {}
    for strategy in plan.strategies:
        config = _with_folder(plan.config_of(strategy, 0), plan, f"memory-{strategy}")
        if config.way.lockstep or config.deepspeed_config is not None:  # DDP's buckets, shards, masters
            memory[strategy] = "absent: the tracker does not know its gradients or parameters as such"
            continue
        name = f"memory-{strategy}"
        memory[strategy] = plan.start(limits.categories, config, name=name)[0]
        shutil.rmtree(plan.folder / name)
    measured["memory_by_category"] = memory
    return measured


def _with_folder(config: Config, plan: Plan, name: str) -> Config:
    return replace(config, output_dir=str(plan.folder / name / "run"))


def _measure_link(plan: Plan) -> dict[str, Any]:
    network = plan.network
    assert network is not None
    size = max(1 << 20, min(64 << 20, network.bits // 8 // 4))  # a quarter of a second, mostly
    rates = plan.start(link.measure, network.addresses, size, name="link")
    return {
        "bits_per_s": network.bits,
        "mbit_per_s": [8 * rate / 1e6 for rate in rates],
        "bytes": size,
        "addresses": network.addresses,
        "namespaces": network.identities[1:],
    }


def _run(plan: Plan, strategy: str, repeat: int) -> dict[str, Any]:
    name = f"{repeat + 1}-{strategy}"
    config = _with_folder(plan.config_of(strategy, repeat), plan, name)
    told = plan.start(_train, config, name=name)
    shutil.rmtree(Path(config.output_dir) / "checkpoints")  # as large as the models
    figures = read(Path(config.output_dir), [rank["baseline"] for rank in told], plan)
    wires = [rank["wire"] for rank in told]
    wire = sum(wires) if None not in wires else None
    return {
        "strategy": strategy,
        "repeat": repeat,
        "seed": config.seed,
        "device": told[0]["device"],
        "backend": told[0]["backend"],
        **figures,
        "bytes_wire": wire,
    }


def _train(comm: Comm, config: Config) -> dict[str, Any]:
    """One run of a strategy. Collective: all ranks."""
    import torch

    from resist_ds.trainer import Trainer

    before = link.bytes_sent()
    trainer = Trainer(comm, config)
    try:
        trainer.run()
    finally:
        trainer.folder.release()
    after = link.bytes_sent()
    gpu = comm.device.type == "cuda"
    return {
        "baseline": trainer.meter.baseline,
        "wire": None if before is None or after is None else after - before,
        "device": torch.cuda.get_device_name(comm.device) if gpu else "CPU",
        "backend": comm.backend,
    }


def read(folder: Path, baselines: Sequence[int], plan: Plan) -> dict[str, Any]:
    """A run's figures, from its records; the first of several rounds is a warm-up.

    Args:
        baselines: bytes that each rank held before the run began.
    """
    config = plan.config
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    kinds = {kind: [r for r in records if r["kind"] == kind] for kind in ("round", "eval", "checkpoint")}
    rounds = [kinds["round"][i] for i in counted.measured_rounds(len(kinds["round"]))]
    seconds = [sum(record[key] for record in rounds) for key in ("perf/local_s", "perf/sync_s")]
    images = plan.workers * config.batch_size * config.local_steps * len(rounds)
    steps = (
        config.local_steps * plan.workers // plan.ranks * len(rounds)
    )  # of a rank, which plays W/R workers
    sent = sum(record["comm/bytes_round"] for record in rounds) / len(rounds)
    return {
        "samples_per_s": images / sum(seconds),
        "local_step_s": seconds[0] / steps,
        "sync_s": seconds[1] / len(rounds),
        "bytes_step": sent / config.local_steps,
        "bytes_round": sent,
        "peak_train_bytes": _peak(kinds["round"], baselines),
        "peak_eval_bytes": _peak(kinds["eval"], baselines),
        "peak_save_bytes": _peak(kinds["checkpoint"], baselines),
        "baseline_bytes": max(baselines),
        "bytes_total": records[-1]["comm/bytes_total"],
        "rounds": [
            {k: v for k, v in record.items() if k.startswith(("perf/", "comm/"))} for record in rounds
        ],
    }


def _peak(records: Sequence[dict[str, Any]], baselines: Sequence[int]) -> int:
    """Highest peak of a rank over what it held before the run, in bytes."""
    return max(
        round(record[f"mem/peak_gib/rank{rank}"] * GIB) - baseline
        for record in records
        for rank, baseline in enumerate(baselines)
    )


def _bare(plan: Plan, run: dict[str, Any], slots: int) -> dict[str, float]:
    """A run's bare loops and exchanges, seconds of the slowest rank; right after it, as machines drift."""
    strategy, repeat = run["strategy"], run["repeat"]
    once = strategy in ONCE_A_ROUND
    sent = run["bytes_round"] if once else run["bytes_step"]
    name = f"{repeat + 1}-{strategy}-bare"
    times = plan.start(limits.bare, plan.config_of(strategy, repeat), slots, sent, once, name=name)
    shutil.rmtree(plan.folder / name)
    return {side: max(of_rank[side] for of_rank in times) for side in times[0]}
