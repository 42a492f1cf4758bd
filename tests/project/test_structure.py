"""The house rules that a reader relies on: who may communicate, and what starts fast."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import ROOT

PACKAGE = ROOT / "resist_ds"
MODULES = sorted(PACKAGE.rglob("*.py"))


def nodes(path: Path) -> Iterator[ast.AST]:
    return ast.walk(ast.parse(path.read_text()))


def imported(path: Path) -> set[str]:
    """Dotted names of everything a module imports, wherever in it."""
    names: set[str] = set()
    for node in nodes(path):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


# From the top down.
WINGS = ("telemetry", "forecast", "engines", "protocol", "state", "nets", "data", "options")
# The modules at the root that stand on the wings; all others there are below them.
ABOVE = {"__main__", "trainer", "api"}


def floor(module: str) -> int:
    """How high a module of the package stands; 0 is the ground."""
    wing = module.split(".")[1]
    return len(WINGS) + 1 if wing in ABOVE else len(WINGS) - WINGS.index(wing) if wing in WINGS else 0


def dotted(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def uses(path: Path) -> set[str]:
    """The modules of the package that a module imports, wherever in it."""
    known = {dotted(module) for module in MODULES}
    return (imported(path) & known) - {dotted(path)}


def test_imports_run_downwards() -> None:
    """Whoever reads a wing need not know those above it. (The package itself is the front door.)"""
    upwards = [
        f"{dotted(path)} imports {other}"
        for path in MODULES
        if path != PACKAGE / "__init__.py"
        for other in uses(path)
        if floor(other) > floor(dotted(path))
    ]
    assert not upwards
    assert not [
        path for path in MODULES if any(isinstance(n, ast.ImportFrom) and n.level for n in nodes(path))
    ]


def test_no_imports_run_in_a_circle() -> None:
    left = {dotted(path): uses(path) for path in MODULES if path != PACKAGE / "__init__.py"}
    while free := [name for name, others in left.items() if not others & left.keys()]:
        for name in free:
            del left[name]
    assert not left


def test_the_house_has_these_rooms() -> None:
    """A module belongs to a wing, or is one of the few that all of them stand on or that stand on all."""
    folders = {path.name for path in PACKAGE.iterdir() if path.is_dir() and (path / "__init__.py").is_file()}
    assert folders == set(WINGS)
    assert len([*PACKAGE.glob("*.py")]) <= 12


def test_who_may_import_what_communicates() -> None:
    """Exchanges are in comm, after rendezvous; parallel hands nets to torch's and DeepSpeed's own."""
    users = {
        m.name for m in MODULES if any(n.startswith(("torch.distributed", "deepspeed")) for n in imported(m))
    }
    assert users == {
        "comm.py",
        "rendezvous.py",
        "parallel.py",
        "zero.py",
    }  # zero: the door to DeepSpeed's masters


@pytest.mark.parametrize(
    "name",
    [
        "protocol/partition.py",
        "options/config.py",
        "options/command_line.py",
        "data/order.py",
        "data/image_folder.py",
        "data/pixels.py",
        "data/trouble.py",
        "errors.py",
        "launcher.py",
        "options/accelerate_launch.py",
        "options/strategy.py",
        "options/deepspeed_file.py",
        "options/presets.py",
    ],
)
def test_planning_needs_no_torch(name: str) -> None:
    assert not [n for n in imported(PACKAGE / name) if n.split(".")[0] in ("torch", "timm", "torchvision")]


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_every_module_says_what_it_is_for(path: Path) -> None:
    assert ast.get_docstring(ast.parse(path.read_text()))


def test_every_function_that_communicates_says_so() -> None:
    """Whoever calls a collective of `Comm` is collective too, and its docstring must warn of that."""
    collectives = {
        "all_to_all",
        "broadcast",
        "all_reduce",
        "gather_rows",
        "gather",
        "barrier",
        "agree",
        "collect",
    }
    silent = []
    for module in MODULES:
        for node in ast.walk(ast.parse(module.read_text())):
            if not isinstance(node, ast.FunctionDef) or node.name == "main":
                continue
            calls = {
                call.func.attr
                for call in ast.walk(node)
                if isinstance(call, ast.Call)
                and isinstance(call.func, ast.Attribute)
                and call.func.attr in collectives
                and "comm" in ast.unparse(call.func.value)
            }
            if calls and "Collective" not in (ast.get_docstring(node) or ""):
                silent.append(f"{module.name}:{node.name} calls {sorted(calls)}")
    assert not silent
