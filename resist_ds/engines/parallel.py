"""Nets handed to torch's and DeepSpeed's own parallelism, with the bytes that these send counted.

`comm` is the protocol's communication; here are DDP, FSDP2 (`fully_shard`) and DeepSpeed's engine, which talk
on their own inside a training step, in a team of ranks. The ledger counts what each of their collectives must
send at least: a ring's share; under "gradients" where all ranks are one team, else under "team".
"""

import inspect
import json
import logging
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from resist_ds.comm import Comm, Team, deepspeed_comm
from resist_ds.errors import UserError
from resist_ds.options.config import Config
from resist_ds.protocol.team_gather import KIND


@dataclass(frozen=True)
class Inside:
    """The ranks that share each step of a net, as the libraries are told of them.

    Attributes:
        comm: of all ranks.
        team: those that share it.
        named: the option that asks for it, as it is typed.
        kind: under which the ledger counts what they send each other.
    """

    comm: Comm
    team: Team
    named: str
    kind: str

    @classmethod
    def of(cls, comm: Comm, config: Config) -> "Inside":
        """Of a run: all ranks, a team, or a rank alone."""
        if config.way.lockstep:
            return cls(comm, comm.team(comm.size), f"--strategy {config.strategy}", "gradients")
        assert isinstance(config.team_size, int)
        return cls(comm, comm.team(config.team_size), f"--team_strategy {config.team_strategy}", KIND)

    @property
    def group(self) -> Any:
        return self.team.group or torch.distributed.group.WORLD

    def count(self, sent: int) -> None:
        self.comm.ledger[self.kind] += sent


def data_parallel(inside: Inside, module: nn.Module) -> nn.Module:
    """`module` with its gradients averaged over a team in every backward pass. Collective: the team."""
    team = inside.team
    if team.size == 1:
        return module
    _check_devices(inside)
    group = inside.group

    def counted(_: None, bucket: torch.distributed.GradBucket) -> torch.futures.Future[Tensor]:
        inside.count(_all_reduce(bucket.buffer(), team.size))
        return allreduce_hook(group, bucket)

    # BatchNorm's buffers are not used in training. torch 2.15 has renamed what leaves them alone.
    known = inspect.signature(DistributedDataParallel).parameters
    option = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    given: dict[str, Any] = {option: False, "gradient_as_bucket_view": True, "process_group": group}
    parallel = DistributedDataParallel(module, **given)
    parallel.register_comm_hook(None, counted)
    return parallel


def shard_fully(
    inside: Inside, module: nn.Module, units: Iterable[nn.Module], low: torch.dtype | None
) -> FSDPModule:
    """Spread a meta-device module over a team with FSDP2, each unit gathered on its own and dropped again.

    Collective: the team. `place_shards` gives it memory.

    Args:
        low: in which parameters are gathered and computed with; their gradients are summed in float32.
    """
    comm, team = inside.comm, inside.team
    _check_devices(inside)
    _join_alone(comm)
    # Some of timm's heads end in a view; nobody changes the logits in place.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view")
    mesh = DeviceMesh.from_group(inside.group, comm.device.type)
    policy = MixedPrecisionPolicy() if low is None else MixedPrecisionPolicy(low, reduce_dtype=torch.float32)
    for part in (*units, module):
        fully_shard(part, mesh=mesh, mp_policy=policy)
        if team.size > 1:
            _count_fsdp(inside, part)
    assert isinstance(module, FSDPModule)
    return module


def place_shards(
    module: nn.Module, places: Mapping[str, Mapping[str, Tensor]]
) -> dict[str, dict[str, Tensor]]:
    """Make this rank's rows of a spread module's parameters, and of their optimizer state, the given memory.

    FSDP2 takes memory of its own where it is asked to; what a vector holds it is told of here, as its own
    `reset_sharded_param` would, which copies where rows do not divide.

    Args:
        places: {name: {"parameter" or name of an optimizer state: [⌈rows / ranks⌉, …] or a scalar}}.

    Returns:
        {name: {the same: its tensor over all ranks}}; parameters are the module's own.
    """
    placed: dict[str, dict[str, Tensor]] = {}
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    for part in module.modules():
        if not isinstance(part, FSDPModule):
            continue
        group = part._get_fsdp_state()._fsdp_param_group
        for spread in group.fsdp_params if group else ():
            name, length = names[id(spread.sharded_param)], spread.sharded_size[0]
            found: dict[str, Tensor] = {}
            for kind, place in places[name].items():
                assert place.dim() == 0 or place.size() == spread.padded_sharded_param_size, (name, kind)
                found[kind] = place if place.dim() == 0 else spread.to_sharded_dtensor(place[:length])
            parameter = nn.Parameter(found["parameter"])
            spread._sharded_param_data = places[name]["parameter"].view(-1)
            spread.sharded_param = found["parameter"] = parameter
            spread._setattr_on_modules(parameter)
            placed[name] = found
    return placed


def whole(tensor: Tensor) -> Tensor:
    """A tensor that FSDP2 has spread, whole on every rank. Collective: all ranks."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gather_rows(inside: Inside, part: Tensor) -> list[Tensor]:
    """Every lane's rows of a tensor, on the device. Collective: the team."""
    part = part.to(inside.comm.device).contiguous()
    if inside.team.size == 1:
        return [part]
    parts = [torch.empty_like(part) for _ in range(inside.team.size)]
    inside.count((inside.team.size - 1) * part.nbytes)
    torch.distributed.all_gather(parts, part, group=inside.group)
    return parts


def deepspeed_engine(
    inside: Inside, module: nn.Module, optimizer: torch.optim.Optimizer, options: Mapping[str, Any]
) -> Any:
    """A DeepSpeed engine around `module`, whose team shares the batch. Collective: the team."""
    comm, team = inside.comm, inside.team
    if team.size > 1:
        _check_devices(inside)
    _join_alone(comm)
    deepspeed_comm()  # which sets its environment and its loggers
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    before = os.environ["LOCAL_RANK"]
    if comm.device.type == "cuda":  # DeepSpeed takes the GPU of that number; several ranks may share one
        os.environ["LOCAL_RANK"] = str(comm.device.index)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch's that DeepSpeed's own calls meet
            return deepspeed.initialize(
                model=module,
                optimizer=optimizer,
                config=json.loads(json.dumps(options)),
                mpu=None if team.size == comm.size > 1 else _Groups(inside),
            )[0]
    except (ValueError, TypeError, AssertionError) as error:  # its own checks of its options
        words = " ".join(str(error).split())  # pydantic's first line says how many, the second which
        raise UserError(f"DeepSpeed refuses its options: {words}") from error
    finally:
        os.environ["LOCAL_RANK"] = before


@contextmanager
def deepspeed_counted(inside: Inside) -> Iterator[None]:
    """Count what DeepSpeed's collectives send in the meantime."""
    import deepspeed.comm.comm as backend_of

    backend = backend_of.cdb
    backend_of.cdb = _Counted(backend, inside)
    try:
        yield
    finally:
        backend_of.cdb = backend


def deepspeed_schedule(name: str, params: Mapping[str, Any], lr: float) -> Callable[[int], float]:
    """Step → learning rate, by DeepSpeed's scheduler of that name. Raises `UserError` on wrong parameters.

    `warmup_num_steps` may be 0, which DeepSpeed's classes do not take: they warm up over two steps at least,
    so theirs is begun behind these two.
    """
    deepspeed_comm()
    from deepspeed.runtime import lr_schedules

    behind = 2 if params.get("warmup_num_steps") == 0 else 0
    if behind:
        total = {"total_num_steps": params["total_num_steps"] + behind} if "total_num_steps" in params else {}
        params = {**params, "warmup_num_steps": behind, **total}

    def rate(step: int) -> float:
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=lr)
        scheduler = getattr(lr_schedules, name)(optimizer, **params)
        if step or behind:  # its constructor's is the first step's, and it is stepped after each
            scheduler.step(max(0, step - 1) + behind)
        return float(optimizer.param_groups[0]["lr"])

    try:
        rate(1)
    except (TypeError, ValueError, KeyError) as error:
        raise UserError(f"the DeepSpeed file's scheduler.params: {error}") from None
    return rate


class _Groups:
    """DeepSpeed's `mpu`: the team is data parallel, and nothing else is spread."""

    def __init__(self, inside: Inside):
        comm, team = inside.comm, inside.team
        alone = comm.team(1).group or torch.distributed.group.WORLD  # made before by all
        self.get_data_parallel_group = lambda: inside.group
        self.get_data_parallel_rank = lambda: team.lane
        self.get_data_parallel_world_size = lambda: team.size
        self.get_data_parallel_group_ranks = lambda: list(team.ranks)
        for kind in ("model", "tensor_model"):
            setattr(self, f"get_{kind}_parallel_group", lambda: alone)
            setattr(self, f"get_{kind}_parallel_rank", lambda: 0)
            setattr(self, f"get_{kind}_parallel_world_size", lambda: 1)


class _Counted:
    """DeepSpeed's communication back end, with what it sends added up in the ledger."""

    def __init__(self, backend: Any, inside: Inside):
        self._backend = backend
        self._inside = inside

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._backend, name)
        if name not in _SENT or self._inside.team.size == 1:
            return found
        parameters, sent = _SENT[name]

        def counted(*args: Any, **kwargs: Any) -> Any:
            given = dict(zip(parameters, args, strict=False)) | kwargs
            self._inside.count(sent(given, self._inside.team.size, self._inside.comm.rank))
            return found(*args, **kwargs)

        return counted


def _all_reduce(tensor: Tensor, ranks: int) -> int:
    return 2 * (ranks - 1) * tensor.nbytes // ranks


def _sum(tensors: Iterable[Tensor]) -> int:
    return sum(t.nbytes for t in tensors)


# What a rank sends in each of them at least, from their first two arguments; a reduction to one rank takes
# what everyone else has.
_SENT: dict[str, tuple[tuple[str, ...], Callable[[Any, int, int], int]]] = {
    "all_reduce": (("tensor",), lambda x, size, rank: _all_reduce(x["tensor"], size)),
    "all_reduce_coalesced": (
        ("tensors",),
        lambda x, size, rank: sum(_all_reduce(t, size) for t in x["tensors"]),
    ),
    "reduce": (("tensor", "dst"), lambda x, size, rank: (rank != x["dst"]) * x["tensor"].nbytes),
    "reduce_scatter_tensor": (
        ("output_tensor", "input_tensor"),
        lambda x, size, rank: (size - 1) * x["input_tensor"].nbytes // size,
    ),
    "reduce_scatter": (
        ("output", "input_list"),
        lambda x, size, rank: (size - 1) * _sum(x["input_list"]) // size,
    ),
    "all_gather_into_tensor": (
        ("output_tensor", "input_tensor"),
        lambda x, size, rank: (size - 1) * x["input_tensor"].nbytes,
    ),
    "all_gather": (("tensor_list", "tensor"), lambda x, size, rank: (size - 1) * x["tensor"].nbytes),
    "all_gather_coalesced": (
        ("output_tensors", "input_tensors"),
        lambda x, size, rank: (size - 1) * _sum(x["input_tensors"]),
    ),
    "broadcast": (
        ("tensor", "src"),
        lambda x, size, rank: (rank == x["src"]) * (size - 1) * x["tensor"].nbytes,
    ),
    "all_to_all_single": (
        ("output", "input"),
        lambda x, size, rank: (size - 1) * x["input"].nbytes // size,
    ),
}


def _count_fsdp(inside: Inside, part: nn.Module) -> None:
    from torch.distributed.fsdp._fully_shard._fsdp_collectives import DefaultAllGather, DefaultReduceScatter

    class AllGather(DefaultAllGather):
        def __call__(self, output_tensor: Tensor, input_tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
            inside.count((inside.team.size - 1) * input_tensor.nbytes)
            return super().__call__(output_tensor, input_tensor, *args, **kwargs)

    class ReduceScatter(DefaultReduceScatter):
        def __call__(self, output_tensor: Tensor, input_tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
            inside.count((inside.team.size - 1) * output_tensor.nbytes)
            return super().__call__(output_tensor, input_tensor, *args, **kwargs)

    assert isinstance(part, FSDPModule)
    part.set_custom_all_gather(AllGather())
    part.set_custom_reduce_scatter(ReduceScatter())


def _check_devices(inside: Inside) -> None:
    if inside.comm.lack:
        raise UserError(
            f"{inside.named} needs a GPU for every rank, and {inside.comm.lack}: start fewer ranks"
        )


def _join_alone(comm: Comm) -> None:
    """A process group of one, which FSDP2 and DeepSpeed want where a single rank runs without any."""
    os.environ.setdefault("LOCAL_RANK", str(comm.local_rank))  # DeepSpeed insists
    if not torch.distributed.is_initialized():
        assert comm.size == 1
        backend = "cpu:gloo,cuda:nccl" if comm.device.type == "cuda" else "gloo"
        store = torch.distributed.HashStore()
        torch.distributed.init_process_group(backend, store=store, rank=0, world_size=1)
