"""Check a checkpoint: every file's hash, every tensor's name, shape and type. Exit code 0 sound, 1 not.

python tools/verify.py runs/latest/checkpoints/round-000040
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path, metavar="CKPT", help="the folder of a checkpoint")
    folder: Path = parser.parse_args().checkpoint

    from resist_ds.errors import RunError
    from resist_ds.state.checkpoint import Checkpoint  # after parsing, so that --help does not wait for torch

    try:
        checkpoint = Checkpoint.verified(folder.expanduser())
    except RunError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    state = checkpoint.state
    tensors = sum(map(len, checkpoint.specs.values()))
    size = sum(file.stat().st_size for file in folder.expanduser().iterdir())
    print(
        f"sound: {state.model} at the start of round {state.round} ({state.samples:,} samples seen), "
        f"W = {state.workers}, {tensors} tensors, {size / 1e6:,.1f} MB"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
