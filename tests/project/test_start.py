"""Starting fast and ending clean: what a run imports, and what it leaves in the folder of temporary files."""

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import NoReturn

import pytest

from resist_ds import __main__ as entry
from resist_ds import scratch, trainer
from resist_ds.errors import UserError
from resist_ds.launcher import Launch
from resist_ds.nets import late
from resist_ds.signals import Signals
from tests import ROOT
from tests.conftest import _CONTEXT

# What takes long to import; a run that does not use it must not.
HEAVY = (
    *("accelerate", "deepspeed", "matplotlib", "pandas", "requests", "scipy", "sklearn", "sympy"),
    *("tensorboard", "timm.models", "torch._dynamo", "torch._inductor", "torchvision", "torchvision.ops"),
    *("transformers", "wandb"),
)

# A run in an interpreter of its own: then what it has imported, and whether what has waited is whole.
RUN = f"""
import os, runpy, sys
end = os._exit
def told(code):
    from resist_ds.nets.late import _Late
    found = [name for name in {HEAVY} if name in sys.modules and type(sys.modules[name]) is not _Late]
    print("imported:", *found)
    print("left:", *os.listdir(os.environ["TMPDIR"]))
    if "wandb" not in found:
        import timm, torch, torchvision, wandb
        from importlib.metadata import version
        assert len(timm.list_models()) > 1000 and timm.create_model("vit_tiny_patch16_224", device="meta")
        boxes = torch.tensor([[0.0, 0, 1, 1], [0, 0, 1, 1]])
        assert torchvision.ops.nms(boxes, torch.ones(2), 0.5).tolist() == [0]
        assert callable(torchvision.ops.roi_align) and torchvision.models.resnet18
        assert wandb.__version__ == version("wandb") and callable(wandb.init)
        print("whole")
    sys.stdout.flush()
    end(code)
os._exit = told
runpy.run_path("train.py", run_name="__main__")
"""

OPTIONS = (
    "--model preact_resnet_small --dataset digits --img_size 8 --batch_size 8 --local_steps 2 --rounds 1 "
)
OPTIONS += "--calibration_samples 32 --cpu_threads 1 --progress false"


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """An empty folder for temporary files."""
    place = tmp_path / "tmp"
    place.mkdir()
    return place


def left(place: Path) -> list[str]:
    return sorted(str(path.relative_to(place)) for path in place.rglob("*"))


@pytest.mark.parametrize("log_with", ["none", "wandb"])
def test_a_run_imports_what_it_uses_and_leaves_nothing(log_with: str, place: Path) -> None:
    """In an interpreter of its own, as a user's."""
    command = [sys.executable, "-c", RUN, *OPTIONS.split(), "--log_with", log_with]
    command += ["--output_dir", str(place.parent / "run")]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("WANDB_")}
    environment |= {"TMPDIR": str(place), "HOME": str(place.parent), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=100)
    assert (done.returncode, done.stderr) == (0, "")
    imported, rest = re.search(r"^imported:(.*)\nleft:(.*)$", done.stdout, re.M).groups()  # type: ignore[union-attr]
    if log_with == "none":
        assert imported == rest == ""
        assert "predicted" not in done.stdout  # which would take longer than this run
        assert done.stdout.endswith("whole\n")
    else:
        assert {"accelerate", "wandb"} <= set(imported.split())
        assert list((place.parent / "run" / "wandb").glob("offline-run-*"))
        deadline = time.monotonic() + 30
        while left(place) and time.monotonic() < deadline:  # the socket of its service, which ends by itself
            time.sleep(0.1)
        assert left(place) == []


def test_the_packages_that_wait_are_those_that_this_was_tried_with() -> None:
    """Raise both together: run this file with the new versions, then write them into `TRIED`."""
    pinned = dict(re.findall(r"^([\w.-]+)==([\w.]+)", (ROOT / "constraints.txt").read_text(), re.M))
    assert {name: pinned[name] for name in late.TRIED} == late.TRIED
    assert {name: version(name) for name in late.TRIED} == late.TRIED


# ------------------------------------------------------------------------------------------------------------
# Whatever ends a rank.


def _returns() -> int:
    return 0


def _is_a_wrong_call() -> NoReturn:
    raise UserError("type something else")


def _has_a_defect() -> NoReturn:
    raise ZeroDivisionError


def _is_stopped() -> int:
    with Signals(grace=0, launch=Launch()):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)
    return 0


def _loses_its_launcher() -> int:
    with Signals(grace=0, launch=Launch()) as signals:
        signals._orphaned()
    return 0


def _is_killed() -> NoReturn:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


ENDS = {
    _returns: 0,
    _is_a_wrong_call: 2,
    _has_a_defect: 1,
    _is_stopped: 128 + signal.SIGTERM,
    _loses_its_launcher: 128 + signal.SIGKILL,
    _is_killed: -signal.SIGKILL,
}


def live(place: Path, end: object, young: float) -> None:
    """The life of a rank whose libraries make temporary files, until its `end`."""
    os.dup2(os.open(place.parent / "said", os.O_WRONLY | os.O_CREAT), 2)
    os.environ["TMPDIR"], tempfile.tempdir = str(place), None
    scratch.YOUNG = young

    def train(*_: object) -> int:
        Path(tempfile.mkdtemp("library"), "file").touch()
        assert callable(end)
        return int(end())

    trainer.main = train
    sys.argv = ["train.py"]
    entry.main()


def ended(place: Path, end: object, young: float = 60.0) -> int | None:
    process = _CONTEXT.Process(target=live, args=(place, end, young))
    process.start()
    process.join(60)
    return process.exitcode


@pytest.mark.parametrize("end", ENDS, ids=lambda end: end.__name__.strip("_"))
def test_however_a_rank_ends_its_temporary_files_go(end: object, place: Path) -> None:
    assert ended(place, end) == ENDS[end]  # type: ignore[index]
    if end is not _is_killed:
        assert left(place) == []
        return
    # Nobody cleans up after SIGKILL but the next start; and that not while a folder may just have been made.
    assert len(left(place)) == 3
    assert ended(place, _returns) == 0
    assert len(left(place)) == 3
    assert ended(place, _returns, young=0) == 0
    assert left(place) == []


def test_a_start_leaves_the_files_of_others_alone(place: Path) -> None:
    import fcntl

    mine = place / f"{scratch.PREFIX}mine"
    mine.mkdir()
    (place / "resist_ds-0").mkdir()  # the locks of tools/trial.py
    lock = os.open(mine, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    try:
        assert ended(place, _returns, young=0) == 0
        assert left(place) == ["resist_ds-0", mine.name]
    finally:
        os.close(lock)


def test_the_cache_of_the_compiler_stays_where_runs_share_it(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    monkeypatch.setattr(tempfile, "tempdir", str(place))
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    expected = default_cache_dir()
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "")  # so that it is put back
    del os.environ["TORCHINDUCTOR_CACHE_DIR"]
    scratch.use(compiles=True)
    try:
        assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == expected
        assert Path(tempfile.gettempdir()).parent == place
    finally:
        scratch.remove()
    assert left(place) == []
