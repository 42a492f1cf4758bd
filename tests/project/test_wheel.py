"""A wheel and a source archive, made as for a release, where nothing knows of the checkout."""

import json
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

from resist_ds.options.presets import PRESETS, find
from tests import ROOT
from tests.run.test_launchers import clean_environment

TINY = [
    *("--model", "preact_resnet_small", "--dataset", "synthetic", "--img_size", "8", "--batch_size", "8"),
    *("--local_steps", "2", "--rounds", "2", "--calibration_samples", "32", "--cpu_threads", "1"),
    *("--eval_every", "0", "--log_with", "none"),
]


def run(command: list[str], place: Path) -> str:
    """A command's standard output, from a folder outside the checkout."""
    place.mkdir(exist_ok=True)
    environment = clean_environment() | {"PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    done = subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def packages_of_ours() -> list[str]:
    """Folders of the installed packages of this environment.

    An editable install, as of this project, is hooked in by files that count only in the folder where they
    lie: named in a path or a .pth file, these folders have everything but that.
    """
    found = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    return sorted(found | {path for path in sys.path if path.endswith(("site-packages", "dist-packages"))})


def clean_venv(folder: Path) -> Path:
    """The packages of a new virtual environment that has all that this one has, but the project."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    packages = folder / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"
    (packages / "ours.pth").write_text("".join(f"{path}\n" for path in packages_of_ours()))
    return packages


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of `python -m build`, which makes the wheel from the source archive."""
    folder = tmp_path_factory.mktemp("dist")
    # A copy, as git has it: what earlier builds left in a checkout must neither help nor hurt.
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True
    )
    if listed.returncode:
        pytest.skip("needs git and a checkout, to know what belongs to the project")
    source = folder / "source"
    for name in filter(None, listed.stdout.decode().split("\0")):
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, source / name)
    run([sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(source)], folder)
    return folder


@pytest.fixture(scope="module")
def installed(made: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of an environment in which the wheel is installed.

    Where nothing is compiled and no script made, that is unpacking; test_dockerfile has pip do it.
    """
    folder = tmp_path_factory.mktemp("venv")
    (wheel,) = made.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(clean_venv(folder))
    return folder / "bin" / "python"


def test_the_wheel_holds_the_package_and_the_presets_and_nothing_else(made: Path) -> None:
    (wheel,) = made.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    presets = {f"resist_ds/ds_configs/{path.name}" for path in PRESETS.iterdir() if path.is_file()}
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "resist_ds").rglob("*.py")}
    assert presets >= {"resist_ds/ds_configs/zero1.json", "resist_ds/ds_configs/demo.yaml"}
    assert {name for name in names if ".dist-info/" not in name} == modules | presets


def test_the_source_archive_holds_the_checkout(made: Path) -> None:
    (archive,) = made.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        names = {name.partition("/")[2] for name in tar.getnames()}
    tree = [*ROOT.glob("tests/**/*.py"), *ROOT.glob("tools/**/*.py"), *ROOT.glob("docs/*.md")]
    tree += [path for path in PRESETS.iterdir() if path.is_file()]
    tree += [
        ROOT / name
        for name in ("train.py", "README.md", "LICENSE", "Dockerfile", "constraints.txt", "Makefile")
    ]
    assert {str(path.relative_to(ROOT)) for path in tree} <= names


@pytest.mark.timeout(200)
def test_an_installed_wheel_trains_from_another_folder(installed: Path, tmp_path: Path) -> None:
    """With ZeRO's shipped file, which is the wheel's, as is the code."""
    look = "import resist_ds.options.presets as p; print(p.__file__); print(p.find('zero1', '.json'))"
    code, preset = (Path(line) for line in run([str(installed), "-c", look], tmp_path).splitlines())
    package = code.parent.parent
    assert installed.parent.parent in package.parents and ROOT not in package.parents
    assert preset == package / "ds_configs" / "zero1.json" and preset.is_file()

    options = [*TINY, "--strategy", "zero1", "--output_dir", "out"]
    run([str(installed), "-m", "resist_ds", *options], tmp_path)
    records = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert [r["kind"] for r in records] == ["round", "round", "eval", "checkpoint", "summary"]
    assert records[-1]["settings"]["strategy"] == "zero1"


def test_the_module_answers_like_train_py(installed: Path, tmp_path: Path) -> None:
    assert "--local_steps" in run([str(installed), "-m", "resist_ds", "--help"], tmp_path)


def test_a_preset_is_found_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shipped = PRESETS / "demo.yaml"
    for name in ("demo", "demo.yaml", "ds_configs/demo.yaml", "ds_configs/demo"):
        assert find(name, ".yaml") == shipped, name
    for name in ("nothing", "nothing.yaml", "other/demo.yaml", str(tmp_path / "demo.yaml"), "../demo"):
        assert find(name, ".yaml") == Path(name), name  # whoever reads it says that it is not there


def test_a_file_that_was_typed_wins_over_a_preset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo.yaml").write_text("lr: 1")
    (tmp_path / "cifar10").mkdir()  # a folder is no file of options
    assert find("demo.yaml", ".yaml") == Path("demo.yaml")
    assert find("cifar10", ".yaml") == PRESETS / "cifar10.yaml"
