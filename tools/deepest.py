"""The deepest preact_resnet that trains within a memory: ResIST against ddp and FSDP2, predicted or measured.

    python tools/deepest.py --memory 20gib               # predicted, in a minute or two, on any machine
    python tools/deepest.py --memory 20gib --measure     # on this machine's device

The nets are the paper's CIFAR ResNets with more and more blocks in section 3 (23 in preact_resnet101). A rank
has one worker. Predictions are counted on nets of 20 and 40 pool blocks, and lie on the line through these.
Measured are resist, which needs no other rank for its step, and ddp on one rank, which has fewer buffers than
on several. On a GPU torch may reserve so much and no more, and a step that runs out of it does not fit; on a
CPU what is resident counts.
"""

import argparse
import gc
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache, partial
from itertools import repeat
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from resist_ds.errors import UserError
from resist_ds.options.config import Config

if TYPE_CHECKING:
    from resist_ds.forecast.footprint import Usage
    from resist_ds.nets.blueprint import Blueprint

MODEL = "preact_resnet101"
COUNTED = (20, 40)  # pool blocks
MOST = 100_000
Arm = tuple[str, bool]  # strategy, activation checkpointing
ARMS: tuple[Arm, ...] = tuple((s, c) for c in (False, True) for s in ("resist", "ddp", "fsdp"))


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{' '.join(message.split())} (--help lists the options)")


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = _Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--memory", default="20gib", help="of one device [20gib]")
    parser.add_argument("--workers", type=int, default=4, metavar="W", help="and ranks [4]")
    parser.add_argument("--batch_size", type=int, default=128, metavar="B", help="images per worker [128]")
    parser.add_argument("--mixed_precision", choices=("no", "bf16"), default="bf16", help="[bf16]")
    parser.add_argument("--measure", action="store_true", help="by training steps on this device")
    parser.add_argument("--output_dir", type=Path, help="for deepest.md and deepest.png [none]")
    given = parser.parse_args(argv)
    if given.workers < 1 or given.batch_size < 1:
        raise UserError("--workers and --batch_size are whole numbers above 0")
    return given


def main(argv: Sequence[str] | None = None) -> int:
    try:
        given = parse(argv)
        from resist_ds.forecast.units import MEMORIES, quantity

        memory = quantity("--memory", given.memory, MEMORIES)
        config = Config(
            model=MODEL,
            batch_size=given.batch_size,
            workers=given.workers,
            mixed_precision=given.mixed_precision,
        )
        takes = measured(config, memory) if given.measure else predicted(config)
        found: dict[Arm, int] = {}
        for arm in ARMS:
            if given.measure and arm[0] == "fsdp":
                continue
            held = most_blocks(cache(partial(takes, arm)), memory)
            # The first block of section 3 is no part of the pool; W workers hold W × K blocks at the most.
            found[arm] = 1 + held * (given.workers if arm[0] == "resist" else 1) if held else 0
            print(f"{_name(arm)}: {found[arm]} blocks", flush=True)
        report = table(found, given)
        if given.output_dir:
            given.output_dir.mkdir(parents=True, exist_ok=True)
            (given.output_dir / "deepest.md").write_text(report)
            picture(found, given, given.output_dir / "deepest.png")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(f"\n{report}")
    return 0


def most_blocks(takes: Callable[[int], float], memory: float) -> int:
    """The most pool blocks that a rank can hold within `memory` bytes; 0 where not even one fits.

    Args:
        takes: blocks → bytes, growing, and nearly in proportion: each guess is where a line would cross.
    """
    low, high = 1, 8
    if takes(low) > memory:
        return 0
    while takes(high) <= memory:
        low, high = high, 4 * high
        if high > MOST:
            return low
    while high - low > 1:
        part = 0.5  # where the upper end took more than there is
        if takes(high) < math.inf:
            part = (memory - takes(low)) / (takes(high) - takes(low))
        guess = min(max(low + int(part * (high - low)), low + 1), high - 1)
        if takes(guess) > memory:
            high = guess
        elif takes(guess + 1) > memory:
            return guess
        else:
            low = guess + 1
    return low


def blueprint_of(slots: int) -> "Blueprint":
    """Of a net with so many pool blocks."""
    from resist_ds.nets.blueprint import CIFAR_NETS, Blueprint

    (first, second, _, last), widths = CIFAR_NETS[MODEL]
    name = f"preact_resnet_{slots}"
    CIFAR_NETS[name] = ((first, second, 1 + slots, last), widths)
    return Blueprint(name, 10)


def of(config: Config, arm: Arm) -> Config:
    """The options of an arm's step."""
    strategy, checkpointing = arm
    way: Any = strategy
    return replace(config, strategy=way, workers=None, activation_checkpointing=checkpointing)


def predicted(config: Config) -> Callable[[Arm, int], float]:
    """(arm, pool blocks held) → predicted bytes of a rank on a GPU, at the peak of a round."""
    from resist_ds.forecast.footprint import count_once
    from resist_ds.forecast.memory import memory_of

    @cache
    def usage(lockstep: bool, checkpointing: bool, slots: int) -> "Usage":
        asked = of(config, ("ddp" if lockstep else "resist", checkpointing))
        return count_once(blueprint_of(slots), asked, slots, 32, "cuda")

    @cache
    def counted(arm: Arm, slots: int) -> float:
        strategy, checkpointing = arm
        found = usage(strategy != "resist", checkpointing, slots)
        ranks = config.workers or 1
        memory = memory_of(strategy, ranks, slots, found, blueprint_of(slots), of(config, arm), "cuda")
        return max(memory["step"] + memory["transit"], memory["sync"])

    def takes(arm: Arm, slots: int) -> float:
        first, last = (counted(arm, number) for number in COUNTED)
        return first + (last - first) * (slots - COUNTED[0]) / (COUNTED[1] - COUNTED[0])

    return takes


def measured(config: Config, cap: float) -> Callable[[Arm, int], float]:
    """(arm, pool blocks held) → bytes that this machine's device has needed for two local steps.

    Args:
        cap: bytes that torch may reserve on a GPU; what needs more is infinite.
    """
    import torch

    from resist_ds.engines.engine import TorchEngine
    from resist_ds.engines.local import local_steps
    from resist_ds.memory import PeakMemory
    from resist_ds.nets.precision import choose_kernels
    from resist_ds.nets.subnet import StateLayout, Subnet

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    choose_kernels(config)
    if device.type == "cuda":
        whole = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, cap / whole), device)
    images = torch.zeros(config.batch_size, 3, 32, 32, device=device)
    labels = torch.zeros(config.batch_size, dtype=torch.int64, device=device)

    def takes(arm: Arm, slots: int) -> float:
        asked, blueprint = of(config, arm), blueprint_of(slots)
        memory = PeakMemory(device)
        gc.collect()  # the net before this one, which refers to itself
        if device.type == "cuda":
            torch.cuda.empty_cache()
        before = memory.now() if device.type == "cpu" else 0
        memory.reset()
        try:
            subnet = Subnet(blueprint, StateLayout.of(blueprint, asked, slots), asked, device)
            local_steps(TorchEngine(subnet, asked), repeat((images, labels)), rates=[0.0, 0.0])
        except torch.OutOfMemoryError:
            return math.inf
        return memory.read()[0] - before

    return takes


def _name(arm: Arm) -> str:
    return arm[0] + (" with activation checkpointing" if arm[1] else "")


def table(found: dict[Arm, int], given: argparse.Namespace) -> str:
    """Markdown."""
    how = "measured" if given.measure else "predicted"
    lines = [
        f"Most blocks of section 3 that train in {given.memory} a device, {how}: batch {given.batch_size}, "
        f"{given.mixed_precision}, W = {given.workers}",
        "",
        "| activation checkpointing | " + " | ".join(dict.fromkeys(s for s, _ in found)) + " |",
        "|---" * (1 + len({s for s, _ in found})) + "|",
    ]
    for checkpointing in (False, True):
        row = [f"{blocks:,}" for (_, c), blocks in found.items() if c == checkpointing]
        lines.append(f"| {'with' if checkpointing else 'without'} | " + " | ".join(row) + " |")
    return "\n".join(lines) + "\n"


def picture(found: dict[Arm, int], given: argparse.Namespace, path: Path) -> None:
    """Bars, a group without activation checkpointing and one with it."""
    try:
        import matplotlib
    except ModuleNotFoundError:
        print("no picture, as matplotlib is not installed (pip install matplotlib)")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    ways = list(dict.fromkeys(s for s, _ in found))
    for i, way in enumerate(ways):
        values = [found[way, c] for c in (False, True)]
        bars = axes.bar([g + i / (len(ways) + 1) for g in (0, 1)], values, 1 / (len(ways) + 1), label=way)
        axes.bar_label(bars, [f"{v:,}" for v in values])
    axes.set_xticks([(len(ways) - 1) / 2 / (len(ways) + 1) + g for g in (0, 1)])
    axes.set_xticklabels(["plain", "with activation checkpointing"])
    axes.set_ylabel("blocks in section 3")
    how = "measured" if given.measure else "predicted"
    axes.set_title(f"The deepest net in {given.memory}, batch {given.batch_size} ({how})")
    axes.legend(frameon=False)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


if __name__ == "__main__":
    sys.exit(main())
