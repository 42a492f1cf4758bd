"""Check a checkpoint: every file's hash, every tensor's name, shape and type.

Exit code 0: sound; 1: damaged; 2: it cannot be told (it cannot be read, or is of another version).

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

    from resist_ds.errors import DamagedError, RunError, UserError
    from resist_ds.state.checkpoint import Checkpoint  # after parsing, so that --help does not wait for torch
    from resist_ds.state.storage import check_listing

    try:
        if not folder.expanduser().is_dir():  # a name mistyped, and no damage
            raise UserError(f"{folder}: no such folder")
        checkpoint = Checkpoint.verified(folder.expanduser())
        size = sum(entry.size for entry in check_listing(folder.expanduser()).values())
    except RunError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1 if isinstance(error, DamagedError) else 2
    state = checkpoint.state
    tensors = sum(map(len, checkpoint.specs.values()))
    print(
        f"sound: {state.model} at the start of round {state.round} ({state.samples:,} samples seen), "
        f"W = {state.workers}, {tensors} tensors, {size / 1e6:,.1f} MB"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
