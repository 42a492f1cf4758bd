"""Runs of several strategies, in turn and repeated: what each run's own records say of it.

All run in the same trainer on the same synthetic images, each run in fresh processes. Every repeat has
another seed, and runs the strategies in the opposite order, so that a machine that slows down slows down all.
Peers run in loops of their own, on the same images; one that fails is left out from there on, in words.
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
from tools.benchmark.peers import PEERS, lack
from tools.benchmark.peers import train as train_peer
from tools.benchmark.variants import Variant

GIB = 1 << 30


@dataclass(frozen=True)
class Plan:
    """What is to be compared.

    Attributes:
        config: of what all have alike; its `cpu_threads` are fixed.
        variants: in the order of the first repeat.
        ranks: R.
        network: where the ranks live, or None: on this machine's own network.
        folder: for the runs' folders.
        timeout: seconds for one run.
    """

    config: Config
    variants: tuple[Variant, ...]
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
        return -(-self.workers // self.nodes)

    @property
    def nodes(self) -> int:
        """Ranks, or the teams of them, each of which is a machine on the network."""
        assert isinstance(self.config.team_size, int)
        return self.ranks // self.config.team_size

    def config_of(self, variant: Variant, repeat: int) -> Config:
        return replace(variant.config, seed=self.config.seed + repeat)

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
    ours = [variant for variant in plan.variants if not variant.peer]
    configs = {v.name: [plan.config_of(v, repeat) for repeat in range(plan.repeats)] for v in ours}
    facts = plan.start(counted.facts, configs, size=1, name="facts")[0]
    measured: dict[str, Any] = {"facts": facts, "link": None, "runs": []}
    if plan.network is not None:
        measured["link"] = _measure_link(plan)
        say(f"link: {min(measured['link']['mbit_per_s']):.0f} Mbit/s each way, measured")
    failed = {v.name: why for v in plan.variants if v.peer and (why := lack(v.peer))}
    for name, why in failed.items():
        say(f"{name} is left out: {why}")
    for repeat in range(plan.repeats):
        for variant in plan.variants if repeat % 2 == 0 else plan.variants[::-1]:
            if variant.name in failed:
                continue
            run = (_run_peer if variant.peer else _run)(plan, variant, repeat)
            if isinstance(run, str):
                failed[variant.name] = run
                say(f"{variant.name} is left out from here on: {run}")
                continue
            if not variant.peer and plan.nodes == plan.ranks:  # bare work knows no teams
                run["bare"] = _bare(plan, variant, run, facts["strategies"][variant.name]["slots"])
            measured["runs"].append(run)
            speed = f"{run['samples_per_s']:.1f} samples/s"
            say(f"repeat {repeat + 1} of {plan.repeats}: {variant.name} {speed}")
    memory: dict[str, Any] = {}
    for variant in ours:
        name = f"memory-{variant.file}"
        config = _with_folder(plan.config_of(variant, 0), plan, name)
        if config.inside or config.deepspeed_config is not None:  # DDP's buckets, shards, masters
            memory[variant.name] = "absent: the tracker does not know its gradients or parameters as such"
            continue
        memory[variant.name] = plan.start(limits.categories, config, name=name)[0]
        shutil.rmtree(plan.folder / name)
    return measured | {"memory_by_category": memory, "failed": failed}


def _with_folder(config: Config, plan: Plan, name: str) -> Config:
    return replace(config, output_dir=str(plan.folder / name / "run"))


def _measure_link(plan: Plan) -> dict[str, Any]:
    network = plan.network
    assert network is not None
    size = max(1 << 20, min(64 << 20, network.bits // 8 // 4))  # a quarter of a second, mostly
    rates = plan.start(link.measure, network.addresses, size, name="link")
    return {
        "bits_per_s": network.bits,
        "mbit_per_s": [8 * rate / 1e6 for rate in rates if rate is not None],
        "bytes": size,
        "addresses": network.addresses,
        "namespaces": network.identities[1:],
    }


def _run(plan: Plan, variant: Variant, repeat: int) -> dict[str, Any]:
    name = f"{repeat + 1}-{variant.file}"
    config = _with_folder(plan.config_of(variant, repeat), plan, name)
    told = plan.start(_train, config, name=name)
    shutil.rmtree(Path(config.output_dir) / "checkpoints")  # as large as the models
    figures = read(Path(config.output_dir), config, [rank["baseline"] for rank in told], plan.ranks)
    wires = [rank["wire"] for rank in told[:: plan.ranks // plan.nodes]]  # of a machine, all its ranks'
    wire = sum(wires) if None not in wires else None
    return {
        "strategy": variant.name,
        "repeat": repeat,
        "seed": config.seed,
        "device": told[0]["device"],
        "backend": told[0]["backend"],
        **figures,
        "bytes_wire": wire,
    }


def _run_peer(plan: Plan, variant: Variant, repeat: int) -> dict[str, Any] | str:
    """A peer's figures, or why there are none. Bytes are those of the links; what is not known is None."""
    config, name = plan.config_of(variant, repeat), f"{repeat + 1}-{variant.file}"
    assert variant.peer is not None and config.rounds is not None
    try:
        told = plan.start(train_peer, config, variant.peer, variant.settings, name=name)
    except (UserError, Stopped):
        raise
    except RunError as error:
        return str(error)
    rounds = len(counted.measured_rounds(config))
    seconds, steps = max(rank["seconds"] for rank in told), [rank["step_s"] for rank in told]
    sent = None if plan.network is None else sum(rank["wire"] for rank in told) / rounds
    step = None if None in steps else max(steps)
    waited = None if step is None else max(0.0, seconds / rounds - step * config.local_steps)
    return {
        "strategy": variant.name,
        "repeat": repeat,
        "seed": config.seed,
        "device": told[0]["device"],
        "backend": told[0]["backend"],
        "package": f"{PEERS[variant.peer].package} {told[0]['version']}",
        "samples_per_s": plan.workers * config.batch_size * config.local_steps * rounds / seconds,
        "local_step_s": step,
        "sync_s": None,
        "sync_exposed_s": waited,
        "waited_share": None if waited is None else waited * rounds / seconds,
        "steps": config.local_steps,
        "bytes_step": sent and sent / config.local_steps,
        "bytes_round": sent,
        "peak_train_bytes": max(rank["peak"] - rank["baseline"] for rank in told),
        "peak_eval_bytes": None,
        "peak_save_bytes": None,
        "baseline_bytes": max(rank["baseline"] for rank in told),
        "bytes_total": None,
        "bytes_wire": None if plan.network is None else sum(rank["wire"] for rank in told),
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


def read(folder: Path, config: Config, baselines: Sequence[int], ranks: int) -> dict[str, Any]:
    """A run's figures, from its records; the first of several rounds is a warm-up.

    Args:
        baselines: bytes that each rank held before the run began.
    """
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    kinds = {kind: [r for r in records if r["kind"] == kind] for kind in ("round", "eval", "checkpoint")}
    every = kinds["round"]
    counts = counted.measured_rounds(config)
    rounds = [every[i] for i in counts]
    assert config.workers is not None and isinstance(config.team_size, int)  # a team plays W/T workers
    before = every[counts.start - 1]["samples_seen"] if counts.start else 0
    images = rounds[-1]["samples_seen"] - before
    steps = images / (config.workers * config.batch_size) / len(rounds)  # of a worker, in a round
    local, sync = (sum(record[key] for record in rounds) for key in ("perf/local_s", "perf/sync_s"))
    if counts.start:  # by the clock, as a peer's, from the end of one round to that of another
        seconds = rounds[-1]["perf/wall_s"] - every[counts.start - 1]["perf/wall_s"]
    else:  # of the rank that was slowest in both: who waits for another in one was fast in the other
        seconds = sum(images / len(rounds) / record["perf/samples_per_s"] for record in rounds)
    # What everybody waited for is all of it where nothing hides behind local steps.
    waited = sum(record.get("perf/sync_exposed_s", record["perf/sync_s"]) for record in rounds)
    sent = sum(record["comm/bytes_round"] for record in rounds) / len(rounds)
    return {
        "samples_per_s": images / seconds,
        "local_step_s": local / (steps * len(rounds) * config.workers / (ranks / config.team_size)),
        "sync_s": sync / len(rounds),
        "sync_exposed_s": waited / len(rounds),
        "waited_share": waited / seconds,
        "steps": steps,
        "bytes_step": sent / steps,
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


def _bare(plan: Plan, variant: Variant, run: dict[str, Any], slots: int) -> dict[str, float]:
    """A run's bare loops and exchanges, seconds of the slowest rank; right after it, as machines drift."""
    once = variant.once_a_round
    sent = run["bytes_round"] if once else run["bytes_step"]
    name = f"{run['repeat'] + 1}-{variant.file}-bare"
    config = plan.config_of(variant, run["repeat"])
    times = plan.start(limits.bare, config, slots, sent, once, name=name)
    shutil.rmtree(plan.folder / name)
    return {side: max(of_rank[side] for of_rank in times) for side in times[0]}
