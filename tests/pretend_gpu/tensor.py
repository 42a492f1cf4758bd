"""Tensors of the pretended device: a wrapper that says `cuda:N` around numbers on the CPU."""

import threading
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing

from tests.pretend_gpu.record import RECORD, Copy

aten = torch.ops.aten

_VIEWS = {"aten::_unsafe_view", "aten::lift_fresh", "aten::detach", "aten::alias"}  # some without saying so
_ALLOCATES = {"empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided"}
_INDEXING = {
    "aten::index",
    "aten::index_put_",
    "aten::index_put",
    "aten::_index_put_impl_",
}  # take CPU indices


class GpuTensor(Tensor):
    """A tensor of the pretended device.

    Attributes:
        inner: its numbers.
    """

    inner: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, inner: Tensor, device: torch.device) -> "GpuTensor":
        self = Tensor._make_wrapper_subclass(
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=device,
        )
        self.inner = inner
        return self

    @classmethod
    def __torch_dispatch__(
        cls, operation: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return dispatch(operation, args, kwargs or {})

    def __repr__(self, *, tensor_contents: object = None) -> str:
        return f"GpuTensor({self.inner!r}, device={self.device})"

    def data_ptr(self) -> int:
        return self.inner.data_ptr()

    def is_pinned(self, device: object = None) -> bool:
        return False

    def record_stream(self, stream: object) -> None:
        """Memory is given back by the host here."""

    def tolist(self) -> Any:
        return self.cpu().tolist()

    @property
    def data(self) -> Tensor:  # type: ignore[override]
        return Tensor.data.__get__(self)

    @data.setter
    def data(self, other: Tensor) -> None:
        if not isinstance(other, GpuTensor):
            raise RuntimeError("the data of a CUDA tensor cannot become that of a CPU tensor")
        Tensor.data.__set__(self, other)  # type: ignore[attr-defined]
        self.inner = other.inner

    def __deepcopy__(self, memo: dict[int, Any]) -> "GpuTensor":
        copy = self.detach().clone().requires_grad_(self.requires_grad)
        assert isinstance(copy, GpuTensor)
        return copy

    def __reduce_ex__(self, protocol: object) -> Any:
        raise RuntimeError("a CUDA tensor is pickled")


class Here(TorchDispatchMode):
    """The mode that makes new tensors on the pretended device, and sees the host's beside it."""

    def __torch_dispatch__(
        self, operation: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # it does so itself, with the tensors that it is made of
        return dispatch(operation, args, kwargs or {})


class Storages:
    """Some storages, as long as they live."""

    def __init__(self) -> None:
        self._storages: dict[int, StorageWeakRef] = {}

    def add(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        self._storages[storage._cdata] = StorageWeakRef(storage)
        return tensor

    def __contains__(self, tensor: Tensor) -> bool:
        place = tensor.untyped_storage()._cdata
        reference = self._storages.get(place)
        if reference is not None and reference.expired():  # another storage has come to lie there
            del self._storages[place]
            return False
        return reference is not None


PINNED = Storages()
"""Of the host's memory, what is pinned."""
LENT = Storages()
"""Numbers of the device that gloo has seen, and may give back as they are: a work's future holds them."""


class Queue:
    """The copies that were begun without blocking and not waited for; of all devices, in their order."""

    def __init__(self) -> None:
        self._begun = 0
        self._waiting: dict[int, Callable[[], object]] = {}
        self._memory: dict[int, range] = {}  # of the host, that each of them touches
        self._lock = threading.RLock()  # a checkpoint's thread waits too

    def in_order(self, host: Tensor) -> None:
        """Before another copy from or to this memory: a stream is done with what came before in it."""
        with self._lock:
            for number, memory in list(self._memory.items()):
                if memory.start < _memory(host).stop and _memory(host).start < memory.stop:
                    self._finish(number)

    def begin_download(self, host: Tensor, values: Tensor) -> None:
        """The numbers arrive when they are waited for; until then there are others."""
        values = values.to(host.dtype, copy=True)
        host.fill_(float("nan") if host.is_floating_point() else torch.iinfo(host.dtype).max)
        self._begin(lambda: host.copy_(values), host)

    def begin_upload(self, host: Tensor) -> None:
        """The numbers must stay what they are until the copy was waited for."""
        values = _bytes(host).clone()

        def check() -> None:
            if not torch.equal(values, _bytes(host)):
                raise RuntimeError(
                    f"pinned memory {tuple(host.shape)} was overwritten before its copy was done"
                )

        self._begin(check, host)

    def mark(self) -> int:
        """What has been begun up to now: an event."""
        return self._begun

    def wait(self, mark: int | None = None) -> None:
        """Until all that was begun before the mark, or before now, is done."""
        with self._lock:
            for number in [n for n in self._waiting if mark is None or n <= mark]:
                self._finish(number)

    def done(self, mark: int) -> bool:
        with self._lock:
            return all(number > mark for number in self._waiting)

    def _begin(self, finish: Callable[[], object], host: Tensor) -> None:
        with self._lock:
            self._begun += 1
            self._waiting[self._begun] = finish
            self._memory[self._begun] = _memory(host)

    def _finish(self, number: int) -> None:
        del self._memory[number]
        self._waiting.pop(number)()


def _memory(tensor: Tensor) -> range:
    """Where a dense tensor lies."""
    return range(tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes)


QUEUE = Queue()


def _bytes(tensor: Tensor) -> Tensor:
    if not tensor.numel():  # what numpy has made has strides then that allow no such view
        return torch.empty(0, dtype=torch.uint8)
    return tensor.contiguous().view(torch.uint8) if tensor.dim() else tensor.reshape(1).view(torch.uint8)


def inner(x: Any) -> Any:
    """The numbers of a tensor, or of all that a list holds; torch's own pytree takes half of a run's time."""
    if isinstance(x, GpuTensor):
        return x.inner
    return type(x)(map(inner, x)) if type(x) in (list, tuple) else x


def outer(x: Any, device: torch.device) -> Any:
    """What an operation returned, as tensors of the device."""
    if isinstance(x, Tensor):
        return GpuTensor(x, device)
    return type(x)(outer(y, device) for y in x) if type(x) in (list, tuple) else x


def _back(x: Any, device: torch.device) -> Any:
    """What was lent, as tensors of the device again."""
    if isinstance(x, Tensor):
        return GpuTensor(x, device) if not isinstance(x, GpuTensor) and x in LENT else x
    return type(x)(_back(y, device) for y in x) if type(x) in (list, tuple) else x


def tensors_in(x: Any, found: list[Tensor]) -> list[Tensor]:
    if isinstance(x, Tensor):
        found.append(x)
    elif type(x) in (list, tuple):
        for y in x:
            tensors_in(y, found)
    return found


def with_index(device: torch.device | str) -> torch.device:
    device = torch.device(device)
    no_index = device.type == "cuda" and device.index is None
    return torch.device("cuda", torch.cuda.current_device()) if no_index else device


def dispatch(operation: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Execute an operation on the numbers, if a GPU would; and record what it means to one."""
    tensors = tensors_in([*args, *kwargs.values()], [])
    gpu = [x for x in tensors if isinstance(x, GpuTensor)]
    if gpu and len(gpu) < len(tensors) and any(x in LENT for x in tensors if not isinstance(x, GpuTensor)):
        args = tuple(_back(x, gpu[0].device) for x in args)
        tensors = tensors_in([*args, *kwargs.values()], [])
        gpu = [x for x in tensors if isinstance(x, GpuTensor)]
    if operation is torch.ops.prim.device.default:
        return Tensor.device.__get__(args[0])
    if operation.namespace == "c10d":
        return _exchange(operation, args, kwargs, gpu, len(gpu) == len(tensors))
    if operation is aten.copy_.default:
        return _copy(*args, **kwargs)
    if operation is aten._to_copy.default:
        return _to_copy(*args, **kwargs)
    name = operation._schema.name
    device = _common_device(operation, name, args, tensors, gpu)
    if device is not None:
        _record(operation, name, tensors)
    wanted = kwargs.get("device")
    if wanted is not None:
        wanted = with_index(wanted)
        if wanted.type == "cuda":
            kwargs, device = kwargs | {"device": torch.device("cpu")}, wanted
        elif wanted.type == "cpu":
            device = None
    pinned = kwargs.get("pin_memory")
    if pinned is not None:
        kwargs = kwargs | {"pin_memory": False}
    result = operation(*inner(args), **{k: inner(x) for k, x in kwargs.items()})
    if pinned:
        return PINNED.add(result)
    if device is None:
        return result
    result = outer(result, device)
    return return_and_correct_aliasing(operation, args, kwargs, result) if gpu else result


def _common_device(
    operation: Any, name: str, args: tuple[Any, ...], tensors: Iterable[Tensor], gpu: list[GpuTensor]
) -> torch.device | None:
    """Where an operation is executed; None: on the host. Errors: RuntimeError, as of CUDA."""
    if not gpu:
        return None
    devices = {x.device for x in gpu}
    host = [x for x in tensors if not isinstance(x, GpuTensor)]
    # Pointwise kernels take the host's scalars, though not to write to; indices may lie there too.
    scalars = torch.Tag.pointwise in operation.tags and isinstance(args[0], GpuTensor) | (
        not operation._schema.is_mutable
    )
    allowed = (scalars and all(x.dim() == 0 for x in host)) or (
        name in _INDEXING and isinstance(args[0], GpuTensor)
    )
    if len(devices) > 1 or (host and not allowed):
        found = ", ".join(f"{tuple(x.shape)} on {x.device}" for x in tensors)
        raise RuntimeError(f"Expected all tensors to be on the same device: {operation} of {found}")
    for x in host if name in _INDEXING else ():
        RECORD.copy(Copy(to_device=True, pinned=x in PINNED, blocking=True))
    return gpu[0].device


def _record(operation: Any, name: str, tensors: Iterable[Tensor]) -> None:
    tags = operation.tags
    data_dependent = torch.Tag.data_dependent_output in tags or torch.Tag.dynamic_output_shape in tags
    if name in _INDEXING:  # dynamic in name only, unless a mask is to be counted
        data_dependent = any(x.dtype in (torch.bool, torch.uint8) for x in list(tensors)[1:])
    if data_dependent:
        RECORD.wait(name.removeprefix("aten::"))
        QUEUE.wait()
    if not (operation.is_view or name in _VIEWS or name.removeprefix("aten::") in _ALLOCATES):
        RECORD.launch(name.removeprefix("aten::"))


def _copy(target: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    to_device, from_device = isinstance(target, GpuTensor), isinstance(source, GpuTensor)
    if to_device and from_device:
        RECORD.launch("copy_")
    elif not to_device and not from_device:
        target.copy_(source)
        return target
    else:
        host = source if to_device else target
        # What is converted or turned round on its way goes through fresh memory of the host.
        straight = source.dtype == target.dtype and source.shape == target.shape
        straight &= host.is_contiguous() or source.stride() == target.stride()
        pinned = host in PINNED and straight
        if _begin_copy(host, pinned, non_blocking, to_device) and not to_device:
            QUEUE.begin_download(target, inner(source))
            return target
    inner(target).copy_(inner(source))
    return target


def _to_copy(source: Tensor, *, non_blocking: bool = False, **options: Any) -> Tensor:
    device = with_index(options.pop("device", None) or source.device)
    options.pop("pin_memory", None)
    if device.type != "cpu" and not isinstance(source, GpuTensor):
        QUEUE.in_order(source)  # what is still on its way to there comes first
    values = aten._to_copy.default(inner(source), **options)
    if device.type == "cpu":
        if isinstance(source, GpuTensor):
            straight = values.dtype == source.dtype and values.stride() == source.stride()
            if non_blocking:  # torch then takes pinned memory
                PINNED.add(values)
            if _begin_copy(values, non_blocking and straight, non_blocking, to_device=False):
                QUEUE.begin_download(values, inner(source))
        return values
    if isinstance(source, GpuTensor):
        RECORD.launch("_to_copy")
    else:
        pinned = source in PINNED and source.dtype == values.dtype and values.stride() == source.stride()
        _begin_copy(source, pinned, non_blocking, to_device=True)
    return GpuTensor(values, device)


def _begin_copy(host: Tensor, pinned: bool, non_blocking: bool, to_device: bool) -> bool:
    """Record a copy, wait for it if it blocks; whether it goes on in the background."""
    blocking = not non_blocking or (not pinned and not to_device)
    RECORD.copy(Copy(to_device, pinned, blocking))
    QUEUE.in_order(host)
    if blocking:
        QUEUE.wait()
    elif pinned and to_device:
        QUEUE.begin_upload(host)
    return pinned and not blocking


def _exchange(
    operation: Any, args: tuple[Any, ...], kwargs: dict[str, Any], gpu: list[GpuTensor], whole: bool
) -> Any:
    """A collective: gloo carries what NCCL would."""
    if gpu and not whole:
        raise RuntimeError(f"Expected all tensors to be on the same device: {operation}")
    for x in gpu:
        LENT.add(x.inner)
    result = operation(*inner(args), **{k: inner(x) for k, x in kwargs.items()})
    arrived = {id(x.inner): x for x in gpu}

    def back(x: Any) -> Any:
        if isinstance(x, Tensor):
            return arrived.get(id(x), x)
        return type(x)(map(back, x)) if type(x) in (list, tuple) else x

    return back(result)
