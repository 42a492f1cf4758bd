"""What the launcher's variables make of this process: its place among the ranks. They are read here alone.

torchrun, accelerate launch and deepspeed set RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT. A
shell or a notebook may hold some of them from another job: what is not whole, or does not fit, is named
instead of being waited for. Imports no torch, so that a mistake is answered at once.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from resist_ds.errors import UserError

# Who starts several processes and makes no ranks of them; which variable says how many, and which says who.
_OTHERS = {
    "OMPI_COMM_WORLD_SIZE": ("mpirun", "OMPI_COMM_WORLD_RANK"),
    "MV2_COMM_WORLD_SIZE": ("mpirun", "MV2_COMM_WORLD_RANK"),
    "PMI_SIZE": ("mpirun", "PMI_RANK"),
    # Of a step, and not SLURM_NTASKS: a batch script that is to start four tasks is itself one process.
    "SLURM_STEP_NUM_TASKS": ("srun", "SLURM_PROCID"),
}
_LET = "or let a launcher set them (torchrun, accelerate launch, deepspeed)"


@dataclass(frozen=True)
class Launch:
    """This process's place in its job.

    Attributes:
        rank, size: r and R.
        local_rank, local_size: the same on this machine.
        launched: a launcher has started this process as a rank; also as the only one.
        agent_store: torchrun itself listens where the ranks meet, and not rank 0.
        attempt: how often torchrun has started these ranks again (`--max-restarts`).
        place: MASTER_ADDR and MASTER_PORT as they are; `address` checks them.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    launched: bool = False
    agent_store: bool = False
    place: tuple[str | None, str | None] = (None, None)
    attempt: str = "0"

    @classmethod
    def read(cls, environment: Mapping[str, str]) -> "Launch":
        """What `environment` says; under plain python the process is the only rank.

        Raises:
            UserError: naming a variable that is missing, or does not fit the others.
        """
        size = _number(environment, "WORLD_SIZE", 1)
        if "WORLD_SIZE" not in environment:
            _refuse_unknown_starters(environment)
        elif size < 1:
            raise UserError(f"WORLD_SIZE is {size}: unset WORLD_SIZE, {_LET}")
        elif size > 1 and "RANK" not in environment:
            raise UserError(f"WORLD_SIZE is {size} and RANK is not set: unset WORLD_SIZE, {_LET}")
        name = "LOCAL_WORLD_SIZE"
        if "WORLD_SIZE" in environment and name not in environment:
            name = "LOCAL_SIZE"  # deepspeed's; elsewhere so common a word may mean anything
        world = f"WORLD_SIZE is {size if 'WORLD_SIZE' in environment else 'not set'}"
        local_size = _within(environment, name, size, range(1, size + 1), world)
        return cls(
            rank=_within(environment, "RANK", 0, range(size), world),
            size=size,
            # Kubernetes starts one process on each machine and does not set it.
            local_rank=_within(
                environment,
                "LOCAL_RANK",
                0,
                range(local_size),
                f"{name} is {local_size}" if name in environment else world,
            ),
            local_size=local_size,
            launched=all(name in environment for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE")),
            agent_store=environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
            place=(environment.get("MASTER_ADDR"), environment.get("MASTER_PORT")),
            attempt=environment.get("TORCHELASTIC_RESTART_COUNT", "0"),
        )

    @property
    def address(self) -> tuple[str, int]:
        """Host and port where the ranks meet; asked where there is more than one.

        Raises:
            UserError: naming the variable that is missing, or cannot be.
        """
        for name, value in zip(("MASTER_ADDR", "MASTER_PORT"), self.place, strict=True):
            if not (value or "").strip():
                state = "not set" if value is None else "empty"
                raise UserError(f"WORLD_SIZE is {self.size} and {name} is {state}: unset WORLD_SIZE, {_LET}")
        host, port = self.place
        assert host is not None and port is not None
        found = {"MASTER_PORT": port}
        return host, _within(found, "MASTER_PORT", 0, range(1, 2**16), "a port lies between 1 and 65535")


def check(environment: Mapping[str, str]) -> None:
    """Raises `UserError` where the variables describe no job, as `Launch.read` and `Launch.address` do."""
    launch = Launch.read(environment)
    if launch.size > 1:
        _ = launch.address


def answers(environment: Mapping[str, str]) -> bool:
    """Whether this process is the one of its machine that says what was mistyped, as all of them read it."""
    try:
        return Launch.read(environment).local_rank == 0
    except UserError:
        return all(environment.get(which, "0") == "0" for _, which in _OTHERS.values())


def _refuse_unknown_starters(environment: Mapping[str, str]) -> None:
    """Several processes that all believe to be alone would write to one folder."""
    for name, (starter, _) in _OTHERS.items():
        count = environment.get(name, "")
        if count.isdecimal() and int(count) > 1:
            raise UserError(
                f"{name} is {count} and WORLD_SIZE is not set: {starter} makes no ranks of its processes; "
                "start torchrun once on each machine (ds_configs/slurm.sh does), or, for one process, "
                f"unset {name}"
            )


def _number(environment: Mapping[str, str], name: str, default: int) -> int:
    text = environment.get(name)
    if text is None:
        return default
    if not text.strip():
        raise UserError(f"{name} is empty: unset {name}, {_LET}")
    try:
        return int(text)
    except ValueError:
        raise UserError(f"{name} is {text!r}, which is no number: unset {name}, {_LET}") from None


def _within(environment: Mapping[str, str], name: str, default: int, fitting: range, because: str) -> int:
    number = _number(environment, name, default)
    if number not in fitting:
        raise UserError(f"{name} is {number} and {because}: unset {name}, {_LET}")
    return number
