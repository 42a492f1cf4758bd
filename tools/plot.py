"""Pictures of runs: accuracy against samples, time and bytes; memory; who trained which block when.

    python tools/plot.py runs/resist runs/ddp                    # writes plots/*.png
    python tools/plot.py runs/seed0 runs/seed1 --output_dir here

Runs whose options differ in the seed alone become one line, their mean, in a band of one standard deviation.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from resist_ds.telemetry.figures import pictures, read


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN_DIR", help="the --output_dir of a run")
    parser.add_argument("--output_dir", type=Path, default=Path("plots"), help="for the pictures [plots]")
    given = parser.parse_args()
    try:
        drawn = pictures([read(path.expanduser()) for path in given.runs])
        given.output_dir.mkdir(parents=True, exist_ok=True)
        for name, figure in drawn.items():
            figure.savefig(given.output_dir / f"{name}.png", dpi=120)
            print(given.output_dir / f"{name}.png")
    except ModuleNotFoundError:
        print("error: tools/plot.py needs matplotlib: type pip install matplotlib", file=sys.stderr)
        return 2
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
