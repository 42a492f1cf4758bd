"""`make demo`: four sub-ResNets against one full net at equal samples, on the GPUs there are, else on CPU.

    python tools/demo.py [any option of train.py, for both runs]

Both runs see the same number of images in the same number of local steps: the single worker's batch is as
large as those of the four together. Figures are read from the metrics.jsonl that the runs have written.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from resist_ds.errors import RunError
from resist_ds.options.command_line import parse

ROOT = Path(__file__).resolve().parent.parent
PRESET = ROOT / "ds_configs" / "demo.yaml"
WORKERS = 4
BATCH_SIZE = 16


def main() -> int:
    try:
        parse(sys.argv[1:])  # a mistake is better told here than by a launcher
    except RunError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    import torch  # here, so that a mistake in the arguments of this file does not wait for it

    gpus = torch.cuda.device_count()
    ranks = min(WORKERS, gpus or len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1)
    single = Path("runs/demo/one_worker")
    start = time.perf_counter()
    print(f"1/2  ResIST: {WORKERS} workers on {ranks} rank{'s' if ranks > 1 else ''}\n", flush=True)
    resist = train(ranks, "--output_dir", "runs/demo")
    print("\n2/2  the full net on one worker, at equal samples\n", flush=True)
    batch = ["--batch_size", str(WORKERS * BATCH_SIZE)]
    full = train(1, "--workers", "1", *batch, "--output_dir", str(single), "--eval_every", "0")

    assert resist["samples_seen"] == full["samples_seen"], "the two runs must see the same number of samples"
    ours, theirs = 100 * resist["eval/accuracy"], 100 * full["eval/accuracy"]
    print(f"\ntest accuracy after {resist['samples_seen']:,} training samples (one seed)")
    print(f"  ResIST, {WORKERS} workers, global model   {ours:6.2f} %")
    print(f"  one worker, the full net          {theirs:6.2f} %   difference {ours - theirs:+.2f} points")
    places = "runs/demo and runs/demo/one_worker"
    print(f"took {time.perf_counter() - start:.0f} s; all figures are in metrics.jsonl of {places}")
    if not sys.argv[1:] and (ours < 98 or ours < theirs - 1):  # with other options who knows
        print("unexpected: the global model should reach 98 % and be within 1 point of the full net")
        return 1
    return 0


def train(ranks: int, *options: str) -> dict[str, Any]:
    """Run train.py on so many ranks; returns the summary that it wrote."""
    launcher = [sys.executable]
    if ranks > 1:
        launcher += ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", str(ranks)]
        launcher += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
        launcher += ["--main_process_port", "0"]
    command = [*launcher, str(ROOT / "train.py"), "--config", str(PRESET), *options, *sys.argv[1:]]
    finished = subprocess.run(command)
    if finished.returncode:
        sys.exit(finished.returncode)
    folder = Path(options[options.index("--output_dir") + 1])
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    summary: dict[str, Any] = json.loads(lines[-1])
    assert summary["kind"] == "summary"
    return summary


if __name__ == "__main__":
    sys.exit(main())
