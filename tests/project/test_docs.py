"""What README and docs tell readers to type is typed here; what they show and link to is there.

Every fenced shell block runs, in order, one bash per document, in a folder that looks like a clone, unless it
is marked `sh no-test`: that is for GPUs, root, clusters, downloads and minutes. `text output` marks what the
commands print: its lines must occur in what they did print, whatever the numbers.
"""

import ast
import dataclasses
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from resist_ds import __version__
from resist_ds.options.config import Config
from tests import ROOT

DOCUMENTS = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
NAMES = [str(path.relative_to(ROOT)) for path in DOCUMENTS]
CLONE = ("train.py", "tools", "ds_configs", "resist_ds")  # what a reader finds where commands are typed
LEAST = {"docs/guide.md": 9, "README.md": 1}  # blocks that are run, so that none gets lost unseen
BLOCK_SECONDS = 240  # a block takes 5 to 20 s on two idle cores

SHELL = ("sh", "bash", "shell")
COMMANDS = (
    "python",
    "make",
    "accelerate",
    "deepspeed",
    "torchrun",
    "pip",
    "uv",
    "docker",
    "sudo",
    "git",
    "srun",
)
COMMANDS += ("sbatch", "salloc", "wandb", "pytest", "export", "cd", "cat", "mkdir", "source", ".", "$")


@dataclass(frozen=True)
class Block:
    """A fenced block: the line of its first line, the words after the fence, and what is inside."""

    line: int
    info: tuple[str, ...]
    text: str

    @property
    def language(self) -> str:
        return self.info[0] if self.info else ""

    @property
    def shell(self) -> bool:
        return self.language in SHELL

    @property
    def tested(self) -> bool:
        return self.shell and "no-test" not in self.info


def blocks_of(text: str) -> list[Block]:
    """All fenced blocks, also indented ones. Raises ValueError where a fence is left open."""
    found: list[Block] = []
    fence, info, start, lines = "", "", 0, list[str]()
    for number, line in enumerate(text.splitlines(), start=1):
        mark = re.match(r" *(`{3,}|~{3,})(.*)", line)
        if not fence and mark:
            fence, info, start, lines = mark[1], mark[2], number + 1, []
        elif fence and mark and mark[1].startswith(fence) and not mark[2].strip():
            found.append(Block(start, tuple(info.split()), textwrap.dedent("\n".join(lines)) + "\n"))
            fence = ""
        elif fence:
            lines.append(line)
    if fence:
        raise ValueError(f"the block of line {start} is never closed")
    return found


BLOCKS = {name: blocks_of(path.read_text()) for name, path in zip(NAMES, DOCUMENTS, strict=True)}
TESTED = sorted(  # the longest first: two at a time then take the least time
    (name for name, blocks in BLOCKS.items() if any(block.tested for block in blocks)),
    key=lambda name: -sum(block.tested for block in BLOCKS[name]),
)


# ------------------------------------------------------------------------------------------------------------
# Typing.


@dataclass(frozen=True)
class Typed:
    """What became of a document's blocks: all that was printed, and what went wrong, if anything did."""

    printed: str
    failure: str


# Sourced, so that `cd` and variables last as at a reader's prompt; the trap names the line of the document.
DRIVER = """\
set -Eeuo pipefail
trap 'echo "line $LINENO failed with $?: $(sed -n "${LINENO}p" "${BASH_SOURCE[0]}")" >&2' ERR
for block in "$@"; do
    source "$block"
    echo >&"$DONE"
done
"""


def type_in(name: str, folder: Path, stop: threading.Event) -> Typed:
    """Run a document's blocks in `folder`."""
    clone, home, scripts = folder / "clone", folder / "home", folder / "blocks"
    for made in (clone, home, scripts):
        made.mkdir(parents=True)
    for path in CLONE:
        (clone / path).symlink_to(ROOT / path)
    waiting = [block for block in BLOCKS[name] if block.tested]
    for block in waiting:  # below empty lines, so that bash's line numbers are the document's
        (scripts / f"{block.line}.sh").write_text("\n" * (block.line - 1) + block.text)
    environment = {
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), "/usr/local/bin", "/usr/bin", "/bin"]),
        "HOME": str(home),
        "TMPDIR": str(home),
        "LANG": "C.UTF-8",
        "PYTHONWARNINGS": "ignore",  # of others: ours are errors in all other tests
        "CUDA_VISIBLE_DEVICES": "",  # what is shown was printed on a CPU
        "WANDB_MODE": "offline",
        "HF_HUB_OFFLINE": "1",
    }
    read, write = os.pipe()
    with (folder / "printed").open("w") as printed:
        bash = subprocess.Popen(
            ["bash", "-c", DRIVER, name, *(str(scripts / f"{block.line}.sh") for block in waiting)],
            cwd=clone,
            env=environment | {"DONE": str(write)},
            stdin=subprocess.DEVNULL,
            stdout=printed,
            stderr=subprocess.STDOUT,
            pass_fds=[write],
            start_new_session=True,
        )
    os.close(write)
    reason, deadline = "", time.monotonic() + BLOCK_SECONDS
    try:
        while waiting and not reason:
            if select.select([read], [], [], 0.2)[0]:
                done = os.read(read, 100)
                waiting, deadline = waiting[len(done) :], time.monotonic() + BLOCK_SECONDS
                if not done:
                    reason = f"bash ended with {bash.wait()} in the block of line {waiting[0].line}"
            elif stop.is_set():
                reason = "the tests were ended"
            elif time.monotonic() > deadline:
                reason = f"the block of line {waiting[0].line} took more than {BLOCK_SECONDS} s"
    finally:
        os.close(read)
        if waiting:
            with suppress(ProcessLookupError):
                os.killpg(bash.pid, signal.SIGKILL)
        code = bash.wait()
    if not reason and code:
        reason = f"bash ended with {code} after the last block"
    return Typed((folder / "printed").read_text(errors="replace"), reason)


@pytest.fixture(scope="module")
def typed(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Future[Typed]]]:
    """{document: what typing its blocks came to}, two documents at a time, of the tests that were chosen."""
    chosen = {item.callspec.params.get("name") for item in request.session.items if hasattr(item, "callspec")}
    stop = threading.Event()
    with ThreadPoolExecutor(2) as pool:
        yield {
            name: pool.submit(type_in, name, tmp_path_factory.mktemp("docs") / "typed", stop)
            for name in TESTED
            if name in chosen
        }
        stop.set()


@pytest.mark.timeout(1200)  # each block has its own
@pytest.mark.parametrize("name", TESTED)
def test_every_block_does_what_it_says(name: str, typed: dict[str, Future[Typed]]) -> None:
    result = typed[name].result()
    if result.failure:
        pytest.fail(f"{name}: {result.failure}\n{result.printed[-6000:]}", pytrace=False)
    printed = {masked(line) for line in result.printed.splitlines()}
    missing = [
        f"{name}:{number}: {line}"
        for block in BLOCKS[name]
        if block.info == ("text", "output")
        for number, line in enumerate(block.text.splitlines(), start=block.line)
        if masked(line) not in printed and line.strip() not in ("", "…")
    ]
    if missing:
        shown = "\n".join(missing)
        pytest.fail(f"shown, but not printed:\n{shown}\nprinted:\n{result.printed[-6000:]}", pytrace=False)


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("name", ["docs/guide.md"])
def test_what_the_guide_exports_is_what_was_tested(name: str, typed: dict[str, Future[Typed]]) -> None:
    printed = typed[name].result().printed
    accuracies = re.findall(
        r"^global model: ([\d.]+) %", printed, re.MULTILINE
    )  # trained, gone on, fine-tuned
    assert len(accuracies) == 3 and float(accuracies[1]) > 85
    assert re.findall(r"^right: ([\d.]+) %", printed, re.MULTILINE) == [accuracies[1]]


def masked(line: str) -> str:
    """A line without its numbers and without the widths of its columns."""
    return re.sub(r"\d[\d.,]*", "#", re.sub(r"-{2,}", "--", " ".join(line.split())))


# ------------------------------------------------------------------------------------------------------------
# Reading.


@pytest.mark.parametrize("name", LEAST)
def test_blocks_are_found(name: str) -> None:
    assert sum(block.tested for block in BLOCKS[name]) >= LEAST[name]


def test_the_guide_runs_the_whole_way() -> None:
    run = "\n".join(block.text for block in BLOCKS["docs/guide.md"] if block.tested)
    steps = ["mine/", "plan.py", "train.py", "--resume auto", "verify.py", "export.py", "timm.create_model"]
    steps += ["plot.py", "--from_pretrained"]
    assert [step for step in steps if step not in run] == []
    shown = [block for block in BLOCKS["docs/guide.md"] if block.info == ("text", "output")]
    assert len(shown) >= 5


@pytest.mark.parametrize("name", NAMES)
def test_no_command_escapes(name: str) -> None:
    """Shell blocks are known by their words; a block that says nothing is a diagram or an output."""
    for block in BLOCKS[name]:
        where = f"{name}:{block.line}"
        assert block.language not in ("console", "zsh", "shell-session"), (
            f"{where}: write sh, without prompts"
        )
        extra = set(block.info[1:]) - {"no-test"} if block.shell else set()
        assert not extra, f"{where}: sh, or sh no-test, not {' '.join(block.info)}"
        if block.language in ("", "text", "txt"):
            first = [line.split()[0] for line in block.text.splitlines() if line.split()]
            commands = [word for word in first if word in COMMANDS or re.fullmatch(r"python[\d.]+", word)]
            assert not commands, f"{where}: {commands[0]} is a command: write ```sh or ```sh no-test"


@pytest.mark.parametrize("name", NAMES)
def test_blocks_that_are_not_run_can_be_read(name: str, tmp_path: Path) -> None:
    """Python compiles, shell parses, and every option of a training run is one."""
    options = {field.name for field in dataclasses.fields(Config)} | {
        "config",
        "print_config",
        "help",
        "deepspeed",
    }
    for block in BLOCKS[name]:
        where = f"{name}:{block.line}"
        if block.language in ("python", "py"):
            ast.parse(block.text, where)
        if block.shell:
            parsed = subprocess.run(
                ["bash", "-n"], input=block.text, capture_output=True, text=True, timeout=20
            )
            assert parsed.returncode == 0, f"{where}: {parsed.stderr}"
            for call in re.findall(
                r"(?:train\.py|-m resist_ds) ([^\n|;&#]*)", block.text.replace("\\\n", " ")
            ):
                unknown = {o.replace("-", "_") for o in re.findall(r"(?<!\S)--([\w-]+)", call)} - options
                assert not unknown, f"{where}: there is no --{', --'.join(sorted(unknown))}"


def test_the_reference_names_every_option() -> None:
    text = (ROOT / "docs" / "reference.md").read_text()
    named = set(re.findall(r"--(\w+)", text))
    assert {field.name for field in dataclasses.fields(Config)} <= named


@pytest.mark.parametrize("name", NAMES)
def test_links_lead_somewhere(name: str) -> None:
    text = (ROOT / name).read_text()
    for block in BLOCKS[name]:  # what is quoted links to nothing
        text = text.replace(textwrap.indent(block.text, ""), "")
    for link in re.findall(r"\]\(([^()\s]+)\)", re.sub(r"`[^`\n]*`", "", text)):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (ROOT / name).parent / path if path else ROOT / name
        assert target.exists(), f"{name}: {link}: no such file"
        if anchor:
            assert anchor in anchors(target), f"{name}: {link}: {target.name} has no such heading"


def test_the_citation_is_of_this_version_and_of_the_paper() -> None:
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert cited["version"] == __version__ and cited["license"] == "Apache-2.0"
    paper = cited["preferred-citation"]
    assert [author["family-names"] for author in paper["authors"]] == [
        "Dun",
        "Wolfe",
        "Jermaine",
        "Kyrillidis",
    ]
    assert paper["identifiers"][0]["value"] == "arXiv:2107.00961" and paper["year"] == 2022


def anchors(path: Path) -> set[str]:
    """What the headings of a document are called in links, as GitHub makes it."""
    headings = re.findall(r"^#+ +(.*?) *$", path.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_fences_are_understood() -> None:
    text = "a\n```sh\nx\n```\n- b\n  ~~~sh no-test\n  y\n    z\n  ~~~\n````\n```\n````\n"
    assert blocks_of(text) == [
        Block(3, ("sh",), "x\n"),
        Block(7, ("sh", "no-test"), "y\n  z\n"),
        Block(11, (), "```\n"),
    ]
    with pytest.raises(ValueError, match="line 3 is never closed"):
        blocks_of("a\n```sh\nx\n")


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
@pytest.mark.parametrize(
    ("text", "failure", "printed"),
    [
        ("```sh\ncd tools\nX=1\n```\n\n```sh\necho $X ${PWD##*/}\n```\n", "", "1 tools"),
        (
            "```sh\ntrue\nfalse | true\n```\n",
            "ended with 1 in the block of line 2",
            "line 3 failed with 1: false | true",
        ),
        ("```sh\necho $NOTHING\n```\n", "in the block of line 2", "line 2: NOTHING: unbound variable"),
        ("```sh\nexit 0\n```\n```sh\ntrue\n```\n", "ended with 0 in the block of line 2", ""),
        ("```sh\nsleep 100\n```\n", "the block of line 2 took more than 1 s", ""),
        ("```sh no-test\nfalse\n```\n```sh\necho ran\n```\n", "", "ran"),
    ],
)
def test_what_fails_is_named(
    text: str, failure: str, printed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(BLOCKS, "made.md", blocks_of(text))
    monkeypatch.setattr(f"{__name__}.BLOCK_SECONDS", 1 if "sleep" in text else 60)
    result = type_in("made.md", tmp_path / "typed", threading.Event())
    assert failure in result.failure and bool(result.failure) == bool(failure)
    assert printed in result.printed
