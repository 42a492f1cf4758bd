"""The house rules that a reader relies on: who may communicate, and what starts fast."""

import ast
from pathlib import Path

import pytest

from tests import ROOT

PACKAGE = ROOT / "resist_ds"
MODULES = sorted(PACKAGE.rglob("*.py"))


def imported(path: Path) -> set[str]:
    """Dotted names of everything a module imports, wherever in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            module = f"resist_ds.{node.module}" if node.level else node.module
            names |= {module, *(f"{module}.{alias.name}" for alias in node.names)}
    return names


def test_who_may_import_what_communicates() -> None:
    """The protocol's exchanges are in comm; parallel hands nets to torch's and DeepSpeed's own."""
    users = {
        m.name for m in MODULES if any(n.startswith(("torch.distributed", "deepspeed")) for n in imported(m))
    }
    assert users == {"comm.py", "parallel.py", "zero.py"}  # zero: the door to DeepSpeed's masters


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
        "options/strategy.py",
        "options/deepspeed_config.py",
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
