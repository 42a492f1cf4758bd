"""Entry point of every launcher: `python -m resist_ds`, `accelerate launch -m resist_ds`,
`torchrun -m resist_ds`, `deepspeed --module resist_ds`; in a checkout train.py is the same. See `--help`.
"""

import io
import os
import signal
import sys
import time
from contextlib import suppress
from typing import NoReturn

from resist_ds import launcher, scratch
from resist_ds.errors import RunError
from resist_ds.options import accelerate_launch
from resist_ds.options.command_line import parse


def main() -> None:
    """One rank's life, or the only one's. Collective: all ranks."""
    parent = os.getppid()  # who it was, should it end while the imports last
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback while the imports last; then see signals.py
    _open_streams()
    try:
        config = parse()
        launcher.check(os.environ)
        accelerate_launch.check(config, os.environ)
    except RunError as error:  # every rank reads the same words: the first of each machine answers
        # A launcher that sees one rank end ends the others, perhaps before that one has said why. Whom nobody
        # ends is alone, whatever the variables say, and answers too.
        if not launcher.answers(os.environ):
            time.sleep(10)
        _end(error.exit_code, f"error: {error}")
    except SystemExit as done:  # --help
        _end(done.code if isinstance(done.code, int) else 1)
    if accelerate_launch.on_cpu(os.environ):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before torch looks

    # After parsing, so that --help and mistakes do not wait for torch.
    from resist_ds.nets import late

    late.defer()
    from resist_ds.trainer import main as train

    scratch.use(compiles=config.compile)
    said = None
    try:
        exit_code = train(config, parent)
    except RunError as error:  # of one rank alone, which has not met the others yet
        exit_code, said = error.exit_code, f"error: {error}"
    finally:
        scratch.remove()
    _end(exit_code, said)


def _open_streams() -> None:
    """Streams that can always be written to: they only inform."""
    while (
        number := os.open(os.devnull, os.O_RDWR)
    ) < 3:  # closed by who started us: the next file would get it
        os.set_inheritable(number, True)
    os.close(number)
    sys.stdout = sys.stdout or open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = sys.stderr or open(2, "w", closefd=False)  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal without a × must not end a run


def _end(exit_code: int, said: str | None = None) -> NoReturn:
    """End at once: the group's own clean-up waits for ranks, and wandb's for a server, that may be gone."""
    with suppress(OSError):  # its reader may be gone
        if said is not None:
            print(said, file=sys.stderr)
        sys.stderr.flush()
    with suppress(OSError):
        sys.stdout.flush()
    os._exit(exit_code)


if __name__ == "__main__":
    main()
