"""Makes the runs that are due, several at a time: each a `train.py` on one rank, in a folder of its own."""

import hashlib
import os
import re
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

from resist_ds.errors import NotFiniteError
from resist_ds.telemetry.figures import Run, read
from tools.accuracy.due import Design, Trial, due
from tools.accuracy.records import BESIDE, Record, append, load, telling
from tools.benchmark.variants import typed

ROOT = Path(__file__).resolve().parent.parent.parent


@dataclass(frozen=True)
class Place:
    """Where runs take place.

    Attributes:
        folder: of the runs; data: of the images; records: what is written when one has ended.
    """

    folder: Path
    data: Path
    records: Path


def run_all(design: Design, place: Place, jobs: int, say: Callable[[str], None]) -> None:
    """Run whatever is due, until nothing is; raises `CalledProcessError` where a run fails."""
    place.folder.mkdir(parents=True, exist_ok=True)
    at_work: dict[Future[Record], Trial] = {}
    with ThreadPoolExecutor(jobs) as pool:
        try:
            while True:
                running = {trial.key(design) for trial in at_work.values()}
                waiting = [t for t in due(design, load(place.records)) if t.key(design) not in running]
                for trial in waiting[: jobs - len(at_work)]:
                    at_work[pool.submit(_run, trial, design, place)] = trial
                if not at_work:
                    return
                done, _ = wait(at_work, return_when=FIRST_COMPLETED)
                for future in done:
                    trial = at_work.pop(future)
                    record = future.result()
                    assert record.key == trial.key(design), "it would be due for ever"
                    append(place.records, record)
                    shown = "NaN" if record.accuracy is None else f"{100 * record.accuracy:.2f} %"
                    say(f"{folder_of(trial, design)}: {shown}")
        except BaseException as error:
            if at_work and not isinstance(error, KeyboardInterrupt):
                say(f"a run has failed; waiting for {len(at_work)} that are on their way")
            pool.shutdown(cancel_futures=True, wait=True)
            raise


def folder_of(trial: Trial, design: Design) -> str:
    """A name that is good for files, and another for another study."""
    arm = re.sub(r"[^\w.=-]+", "-", trial.arm.name)
    study = hashlib.sha256(repr(trial.key(design)).encode()).hexdigest()[:6]
    return f"{arm}-lr{trial.lr:g}-passes{trial.passes:g}-seed{trial.seed}-{study}"


def options_of(trial: Trial, design: Design) -> dict[str, str]:
    """All that a run learns by, as it is typed."""
    options = {**design.study, **trial.arm.options}
    return options | {"lr": f"{trial.lr:g}", "epochs": f"{trial.passes:g}", "seed": str(trial.seed)}


def beside(options: dict[str, str], data: Path, folder: Path) -> dict[str, str]:
    """These options, and where and beside what a run takes place."""
    return {**options, **BESIDE, "data_dir": str(data), "output_dir": str(folder)}


def _run(trial: Trial, design: Design, place: Place) -> Record:
    name = folder_of(trial, design)
    folder = place.folder / name
    options = options_of(trial, design)
    given = beside(options, place.data, folder)
    command = [sys.executable, str(ROOT / "train.py"), *typed(given)]
    log = place.folder / f"{name}.log"
    with log.open("w") as file:
        code = subprocess.run(
            [*command, "--resume=auto"], stdout=file, stderr=file, env=os.environ | {"OMP_NUM_THREADS": "1"}
        ).returncode
    if code == NotFiniteError.exit_code:
        return _record(trial, options, design, None)
    if code:
        raise subprocess.CalledProcessError(code, [str(log)])
    return _record(trial, options, design, read(folder))


def _record(trial: Trial, options: dict[str, str], design: Design, run: Run | None) -> Record:
    facts, accuracy, loss = {}, None, None
    if run is not None:
        last, settings = run.summary, run.settings
        accuracy, loss = last["eval/accuracy"], last["train/loss"]
        facts = {name: settings[name] for name in ("W", "K", "P", "device", "versions", "git_commit")}
        facts |= {"rounds": last["round"], "steps": last["global_step"], "images": last["samples_seen"]}
        facts["workers"] = trial.arm.workers
    return Record(
        arm=trial.arm.name,
        options=telling(options),
        study=telling(design.study),
        data=design.data,
        lr=trial.lr,
        passes=trial.passes,
        seed=trial.seed,
        accuracy=accuracy,
        loss=loss,
        facts=facts,
    )
