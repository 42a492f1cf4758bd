"""Write a checkpoint's global model as one plain timm state dict (safetensors).

    python tools/export.py runs/latest/checkpoints/round-000040 resnet.safetensors

The residual scale of ResIST is folded into the weights, so stock timm loads the file:

    timm.create_model("resnetv2_50", num_classes=10, checkpoint_path="resnet.safetensors")
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
    parser.add_argument(
        "out", type=Path, metavar="OUT", help="the file to write, for instance net.safetensors"
    )
    parser.add_argument(
        "--fold",
        choices=("true", "false"),
        default="true",
        help="false: leave the weights as trained, without the scale that they need at test time",
    )
    given = parser.parse_args()

    from resist_ds.errors import RunError
    from resist_ds.state.checkpoint import Checkpoint  # after parsing, so that --help does not wait for torch
    from resist_ds.state.export import export

    try:
        checkpoint = Checkpoint.verified(given.checkpoint.expanduser())
        out = given.out.expanduser()
        for warning in export(checkpoint, out, fold=given.fold == "true"):
            print(f"warning: {warning}", file=sys.stderr)
    except RunError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    state = checkpoint.state
    print(f"{out}: {state.model}, {state.num_classes} classes, {out.stat().st_size / 1e6:,.1f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
