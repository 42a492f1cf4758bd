"""One trial of a wandb sweep: the files in `tools/sweeps` start it, and it becomes the launcher.

    python tools/trial.py {accelerate,deepspeed,torchrun} RANKS train.py [any option of train.py]

Before that it takes what trials side by side must not share: a GPU per rank, out of those in
CUDA_VISIBLE_DEVICES or of all (none where there is none), a port, and a folder for what the run writes. GPUs
and ports are locks on files, held by the launcher until it ends, however it ends. Trials wait for their GPUs.
"""

import base64
import fcntl
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NoReturn

LAUNCHERS = ("accelerate", "deepspeed", "torchrun")
PORTS = range(29600, 32768)  # above the launchers' own 29500, below what systems give to anybody


def main(arguments: Sequence[str]) -> None:
    """Become the launcher of the trial that the arguments describe. Does not return."""
    agent = os.getppid()
    if len(arguments) < 3 or arguments[0] not in LAUNCHERS or not re.fullmatch("[1-9][0-9]*", arguments[1]):
        fail(f"type: trial.py {{{','.join(LAUNCHERS)}}} RANKS train.py [options]")
    launcher, ranks, program = arguments[0], int(arguments[1]), list(arguments[2:])
    there = visible(os.environ)
    if 0 < len(there) < ranks:
        fail(
            f"{ranks} ranks need {ranks} GPUs and {len(there)} can be seen ({', '.join(there)}): "
            f'write "{len(there)}" after {launcher} in the command of the sweep, or show more of them'
        )
    folder = Path(tempfile.gettempdir()) / f"resist_ds-{os.getuid()}"
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        gpus = wait(folder, there, ranks, agent) if there else []
        ports = take(folder, map(str, free_ports()), "port", 1)
    except OSError as error:
        fail(f"{folder} must be a folder of yours, for locks ({error.strerror}); TMPDIR names another place")
    if not ports:
        fail(f"no port from {PORTS[0]} to {PORTS[-1]} is free")
    words = command(launcher, ranks, ports[0], gpus, program + output(program, os.environ))
    os.execve(words[0], words, environment(os.environ, gpus, agent))


def command(launcher: str, ranks: int, port: str, gpus: Sequence[str], program: Sequence[str]) -> list[str]:
    """What starts the ranks, such that a signal to it reaches them and it waits for their end."""
    if launcher == "torchrun":
        options = ["torch.distributed.run", "--nproc_per_node", str(ranks), "--master_port", port]
    elif launcher == "deepspeed":
        # The inner half of its launcher. The outer one ends at once when asked to stop, while the ranks still
        # save; the agent would go on to its next trial and the GPUs would count as free. It also does not
        # know GPUs by their UUID. -1 hides them: deepspeed numbers the ranks of a CPU, and that shows GPUs.
        world = json.dumps({"localhost": list(gpus) or [-1] * ranks}).encode()
        options = ["deepspeed.launcher.launch", f"--world_info={base64.urlsafe_b64encode(world).decode()}"]
        options += ["--master_addr=127.0.0.1", f"--master_port={port}"]
    elif ranks > 1:
        # All said, so that a trial depends on the sweep alone and not on what `accelerate config` once wrote.
        options = ["accelerate.commands.launch", "--multi_gpu", "--num_processes", str(ranks)]
        options += ["--num_machines", "1", "--machine_rank", "0", "--main_process_port", port]
        options += ["--gpu_ids", "all", "--mixed_precision", "no", "--dynamo_backend", "no"]
    else:
        # One rank needs no launcher, and accelerate's does not pass a signal on to it.
        return [sys.executable, *program]
    return [sys.executable, "-m", *options, *program]


def environment(given: Mapping[str, str], gpus: Sequence[str], agent: int) -> dict[str, str]:
    """The variables of the launcher. It keeps this process's number, and signals.py looks after both."""
    changed = dict(given)
    if gpus:
        changed["CUDA_VISIBLE_DEVICES"] = ",".join(gpus)
    if "WANDB_SWEEP_ID" in given:  # else whoever has typed the command may leave the run alone
        changed["RESIST_DS_LAUNCHERS"] = f"{os.getpid()} {agent}"
        # The agent talks to a server, so rank 0 can; early termination needs what it says.
        changed.setdefault("WANDB_MODE", "online")
    return changed


def output(program: Sequence[str], given: Mapping[str, str]) -> list[str]:
    """--output_dir of a trial: a folder of its own, unless the command line names one."""
    named = any(word.partition("=")[0].replace("-", "_") == "__output_dir" for word in program)
    if named or not {"WANDB_SWEEP_ID", "WANDB_RUN_ID"} <= given.keys():
        return []
    return ["--output_dir", f"runs/sweeps/{given['WANDB_SWEEP_ID']}/{given['WANDB_RUN_ID']}"]


def visible(given: Mapping[str, str]) -> list[str]:
    """The GPUs that trials may use, as CUDA_VISIBLE_DEVICES names them."""
    if "CUDA_VISIBLE_DEVICES" not in given:
        tool = shutil.which("nvidia-smi")
        listed = subprocess.run([tool, "-L"], capture_output=True, text=True).stdout if tool else ""
        return re.findall(r"^GPU (\d+):", listed, re.MULTILINE)
    names: list[str] = []
    for name in given["CUDA_VISIBLE_DEVICES"].split(","):
        if name.strip() in ("", "-1"):  # there CUDA stops, too
            break
        names.append(name.strip())
    return names


def wait(folder: Path, there: Sequence[str], ranks: int, agent: int) -> list[str]:
    """Take so many GPUs, as soon as they are free."""
    said = False
    while not (gpus := take(folder, there, "gpu", ranks)):
        if not said:
            print(
                f"waiting for other trials: {ranks} of the GPUs {', '.join(there)} must be free", flush=True
            )
            said = True
        time.sleep(1)
        if os.getppid() != agent:
            fail("whoever started this trial has ended")
    return gpus


def take(folder: Path, names: Iterable[str], kind: str, count: int) -> list[str]:
    """Lock the first `count` free ones for this process and what it becomes; none where fewer are free."""
    taken: dict[str, int] = {}
    with (folder / "choosing").open("w") as choosing:  # one trial at a time, so that none sees another's half
        fcntl.flock(choosing, fcntl.LOCK_EX)
        for name in names:
            file = folder / f"{kind}-{re.sub(r'[^A-Za-z0-9-]', '_', name)}"
            lock = os.open(file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(lock)
                continue
            taken[name] = lock
            if len(taken) == count:
                break
        for lock in taken.values():
            if len(taken) < count:
                os.close(lock)
            else:  # the launcher has it open, too; the ranks do not, since launchers hand on no open file
                os.set_inheritable(lock, True)
    return list(taken) if len(taken) == count else []


def free_ports() -> Iterator[int]:
    for port in PORTS:
        with socket.socket() as probe:
            try:
                probe.bind(("", port))
            except OSError:
                continue
        yield port


def fail(why: str) -> NoReturn:
    """Say what is wrong, and end."""
    print(f"error: {why}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    main(sys.argv[1:])
