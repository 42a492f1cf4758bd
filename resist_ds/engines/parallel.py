"""Nets handed to torch's and DeepSpeed's own parallelism, with the bytes that these send counted.

`comm` is the protocol's communication; here are DDP, FSDP2 (`fully_shard`) and DeepSpeed's engine, which talk
on their own inside a training step. The ledger counts, under "gradients", what each of their collectives must
send at least: a ring's share.
"""

import inspect
import json
import logging
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from resist_ds.comm import Comm, deepspeed_comm
from resist_ds.errors import UserError

KIND = "gradients"


def data_parallel(comm: Comm, module: nn.Module) -> nn.Module:
    """`module` with its gradients averaged over the ranks in every backward pass. Collective: all ranks."""
    if comm.size == 1:
        return module
    _check_devices(comm, "ddp")
    group = torch.distributed.group.WORLD
    assert group is not None

    def counted(_: None, bucket: torch.distributed.GradBucket) -> torch.futures.Future[Tensor]:
        comm.ledger[KIND] += _all_reduce(bucket.buffer(), comm.size)
        return allreduce_hook(group, bucket)

    # BatchNorm's buffers are not used in training. torch 2.15 has renamed what leaves them alone.
    known = inspect.signature(DistributedDataParallel).parameters
    option = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    given: dict[str, Any] = {option: False, "gradient_as_bucket_view": True}
    parallel = DistributedDataParallel(module, **given)
    parallel.register_comm_hook(None, counted)
    return parallel


def shard_fully(
    comm: Comm, module: nn.Module, units: Iterable[nn.Module], low: torch.dtype | None
) -> FSDPModule:
    """Spread a meta-device module over all ranks with FSDP2, each unit gathered on its own and dropped again.

    Collective: all ranks.

    Args:
        low: in which parameters are gathered and computed with; their gradients are summed in float32.
    """
    _check_devices(comm, "fsdp")
    _join_alone(comm)
    # Some of timm's heads end in a view; nobody changes the logits in place.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view")
    mesh = init_device_mesh(comm.device.type, (comm.size,))
    policy = MixedPrecisionPolicy() if low is None else MixedPrecisionPolicy(low, reduce_dtype=torch.float32)
    for part in (*units, module):
        fully_shard(part, mesh=mesh, mp_policy=policy)
        if comm.size > 1:
            _count_fsdp(comm, part)
    assert isinstance(module, FSDPModule)
    return module


def whole(tensor: Tensor) -> Tensor:
    """A tensor that FSDP2 has spread, whole on every rank. Collective: all ranks."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def share(value: Tensor, like: Tensor) -> Tensor:
    """This rank's part of `value`, which all ranks hold whole, as `like` is spread."""
    if not isinstance(like, DTensor):
        return value
    return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None).to_local()


def deepspeed_engine(
    comm: Comm, module: nn.Module, optimizer: torch.optim.Optimizer, options: Mapping[str, Any], alone: bool
) -> Any:
    """A DeepSpeed engine around `module`. Collective: all ranks, unless `alone`.

    Args:
        alone: a data-parallel group of this rank only; else all ranks share the batch.
    """
    if not alone:
        _check_devices(comm, f"zero{options['zero_optimization']['stage']}")
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
                mpu=_Alone(comm) if alone else None,
            )[0]
    except (ValueError, TypeError, AssertionError) as error:  # its own checks of its options
        words = " ".join(str(error).split())  # pydantic's first line says how many, the second which
        raise UserError(f"DeepSpeed refuses its options: {words}") from error
    finally:
        os.environ["LOCAL_RANK"] = before


@contextmanager
def deepspeed_counted(comm: Comm) -> Iterator[None]:
    """Count what DeepSpeed's collectives send in the meantime."""
    import deepspeed.comm.comm as backend_of

    backend = backend_of.cdb
    backend_of.cdb = _Counted(backend, comm)
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


class _Alone:
    """DeepSpeed's `mpu`: model and data parallel groups of this rank alone."""

    def __init__(self, comm: Comm):
        group = comm.alone or torch.distributed.group.WORLD  # one rank has made its own by now

        def get_group() -> Any:
            return group

        self.get_data_parallel_group = self.get_model_parallel_group = get_group
        self.get_tensor_model_parallel_group = get_group
        for kind in ("data", "model", "tensor_model"):
            setattr(self, f"get_{kind}_parallel_rank", lambda: 0)
            setattr(self, f"get_{kind}_parallel_world_size", lambda: 1)
        self.get_data_parallel_group_ranks = lambda: [comm.rank]


class _Counted:
    """DeepSpeed's communication back end, with what it sends added up in the ledger."""

    def __init__(self, backend: Any, comm: Comm):
        self._backend = backend
        self._comm = comm

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._backend, name)
        if name not in _SENT or self._comm.size == 1:
            return found
        parameters, sent = _SENT[name]

        def counted(*args: Any, **kwargs: Any) -> Any:
            given = dict(zip(parameters, args, strict=False)) | kwargs
            self._comm.ledger[KIND] += sent(given, self._comm)
            return found(*args, **kwargs)

        return counted


def _all_reduce(tensor: Tensor, ranks: int) -> int:
    return 2 * (ranks - 1) * tensor.nbytes // ranks


def _sum(tensors: Iterable[Tensor]) -> int:
    return sum(t.nbytes for t in tensors)


# What a rank sends in each of them at least, from their first two arguments; a reduction to one rank takes
# what everyone else has.
_SENT: dict[str, tuple[tuple[str, ...], Callable[[Any, Comm], int]]] = {
    "all_reduce": (("tensor",), lambda x, comm: _all_reduce(x["tensor"], comm.size)),
    "all_reduce_coalesced": (
        ("tensors",),
        lambda x, comm: sum(_all_reduce(t, comm.size) for t in x["tensors"]),
    ),
    "reduce": (("tensor", "dst"), lambda x, comm: (comm.rank != x["dst"]) * x["tensor"].nbytes),
    "reduce_scatter_tensor": (
        ("output_tensor", "input_tensor"),
        lambda x, comm: (comm.size - 1) * x["input_tensor"].nbytes // comm.size,
    ),
    "reduce_scatter": (
        ("output", "input_list"),
        lambda x, comm: (comm.size - 1) * _sum(x["input_list"]) // comm.size,
    ),
    "all_gather_into_tensor": (
        ("output_tensor", "input_tensor"),
        lambda x, comm: (comm.size - 1) * x["input_tensor"].nbytes,
    ),
    "all_gather": (("tensor_list", "tensor"), lambda x, comm: (comm.size - 1) * x["tensor"].nbytes),
    "all_gather_coalesced": (
        ("output_tensors", "input_tensors"),
        lambda x, comm: (comm.size - 1) * _sum(x["input_tensors"]),
    ),
    "broadcast": (
        ("tensor", "src"),
        lambda x, comm: (comm.rank == x["src"]) * (comm.size - 1) * x["tensor"].nbytes,
    ),
    "all_to_all_single": (
        ("output", "input"),
        lambda x, comm: (comm.size - 1) * x["input"].nbytes // comm.size,
    ),
}


def _count_fsdp(comm: Comm, part: nn.Module) -> None:
    from torch.distributed.fsdp._fully_shard._fsdp_collectives import DefaultAllGather, DefaultReduceScatter

    class AllGather(DefaultAllGather):
        def __call__(self, output_tensor: Tensor, input_tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
            comm.ledger[KIND] += (comm.size - 1) * input_tensor.nbytes
            return super().__call__(output_tensor, input_tensor, *args, **kwargs)

    class ReduceScatter(DefaultReduceScatter):
        def __call__(self, output_tensor: Tensor, input_tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
            comm.ledger[KIND] += (comm.size - 1) * output_tensor.nbytes
            return super().__call__(output_tensor, input_tensor, *args, **kwargs)

    assert isinstance(part, FSDPModule)
    part.set_custom_all_gather(AllGather())
    part.set_custom_reduce_scatter(ReduceScatter())


def _check_devices(comm: Comm, strategy: str) -> None:
    if comm.lack:
        raise UserError(
            f"--strategy {strategy} needs a GPU for every rank, and {comm.lack}: start fewer ranks"
        )


def _join_alone(comm: Comm) -> None:
    """A process group of one, which FSDP2 and DeepSpeed want where a single rank runs without any."""
    os.environ.setdefault("LOCAL_RANK", str(comm.local_rank))  # DeepSpeed insists
    if not torch.distributed.is_initialized():
        assert comm.size == 1
        backend = "cpu:gloo,cuda:nccl" if comm.device.type == "cuda" else "gloo"
        store = torch.distributed.HashStore()
        torch.distributed.init_process_group(backend, store=store, rank=0, world_size=1)
