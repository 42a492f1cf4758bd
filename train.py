"""Entry point of every launcher: python, accelerate launch, deepspeed, torchrun. See `train.py --help`."""

import os
import signal
import sys
import time
from contextlib import suppress

from resist_ds.config import parse
from resist_ds.errors import RunError

if __name__ == "__main__":
    parent = os.getppid()  # who it was, should it end while the imports last
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback while the imports last; then see signals.py
    sys.stdout.reconfigure(errors="replace")  # a terminal without a × must not end a run
    try:
        config = parse()
    except RunError as error:  # every rank reads the same words: the first of each machine answers
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print(f"error: {error}", file=sys.stderr, flush=True)
        else:  # a launcher that sees one rank end ends the others, perhaps before they have said why
            time.sleep(10)
        sys.exit(error.exit_code)

    from resist_ds.trainer import main  # after parsing, so that --help and mistakes do not wait for torch

    exit_code = main(config, parent)
    if exit_code:  # at once: the process group's own clean-up waits for ranks that may be gone
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError):  # its reader may be gone
                stream.flush()
        os._exit(exit_code)
