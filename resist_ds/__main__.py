"""Entry point of every launcher: `python -m resist_ds`, `accelerate launch -m resist_ds`,
`torchrun -m resist_ds`, `deepspeed --module resist_ds`; in a checkout train.py is the same. See `--help`.
"""

import io
import os
import signal
import sys
import time
from contextlib import suppress

from resist_ds.errors import RunError
from resist_ds.options.command_line import parse


def main() -> None:
    """One rank's life, or the only one's. Collective: all ranks."""
    parent = os.getppid()  # who it was, should it end while the imports last
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback while the imports last; then see signals.py
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal without a × must not end a run
    try:
        config = parse()
    except RunError as error:  # every rank reads the same words: the first of each machine answers
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print(f"error: {error}", file=sys.stderr, flush=True)
        else:  # a launcher that sees one rank end ends the others, perhaps before they have said why
            time.sleep(10)
        sys.exit(error.exit_code)

    from resist_ds.trainer import (
        main as train,  # after parsing, so that --help and mistakes do not wait for torch
    )

    try:
        exit_code = train(config, parent)
    except RunError as error:  # of one rank alone, which has not met the others yet
        print(f"error: {error}", file=sys.stderr, flush=True)
        exit_code = error.exit_code
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):  # its reader may be gone
            stream.flush()
    # At once: the process group's own clean-up waits for ranks, and wandb's for a server, that may be gone.
    os._exit(exit_code)


if __name__ == "__main__":
    main()
