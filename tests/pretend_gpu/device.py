"""What stands around the tensors: torch.cuda, torch.accelerator, pinned memory, streams, NCCL."""

import contextlib
import importlib
import threading
import uuid
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.distributed import distributed_c10d
from torch.distributed.fsdp._fully_shard import _fsdp_param
from torch.utils import _foreach_utils

from tests.pretend_gpu.record import RECORD
from tests.pretend_gpu.tensor import PINNED, QUEUE, GpuTensor, Here, with_index

GIB = 1 << 30
optimizer = importlib.import_module("torch.optim.optimizer")  # a name that torch.optim deletes


def install(gpus: Sequence[int]) -> None:
    """Let this process see GPUs from now on; there is no way back.

    Args:
        gpus: which of the machine's it sees, as CUDA_VISIBLE_DEVICES would name them.
    """
    assert gpus
    _replace_cuda(gpus)
    _replace_accelerator(len(gpus))
    _replace_pinned_memory()
    _replace_nccl()
    _replace(_fsdp_param, alloc_storage=_always(None), free_storage=_free_storage)
    for types in (optimizer._foreach_supported_types, _foreach_utils._foreach_supported_types):
        types.append(GpuTensor)
    torch.backends.cudnn.enabled = False  # its operations have no numbers on a CPU
    run = threading.Thread.run

    def run_here(self: threading.Thread) -> None:
        with Here():
            run(self)

    threading.Thread.run = run_here  # type: ignore[method-assign]
    Here().__enter__()
    torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(…) makes it on the host, and then copies it here
    torch.autograd.set_multithreading_enabled(False).__enter__()  # autograd's threads would not be here


def _free_storage(tensor: GpuTensor) -> None:
    """FSDP2 takes a tensor's memory away and gives it back later: its numbers are lost."""
    tensor.inner.fill_(float("nan"))


class Event:
    """torch.cuda.Event."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        self._mark: int | None = None
        self._asked = False

    def record(self, stream: object = None) -> None:
        self._mark, self._asked = QUEUE.mark(), False

    def query(self) -> bool:
        """Not done when first asked, if there is anything to do: a copy takes a while."""
        if self._mark is None or QUEUE.done(self._mark):
            return True
        if self._asked:
            QUEUE.wait(self._mark)
        self._asked = not self._asked
        return not self._asked

    def synchronize(self) -> None:
        RECORD.wait("an event")
        if self._mark is not None:
            QUEUE.wait(self._mark)

    def wait(self, stream: object = None) -> None:
        """All is done in the program's order here, as on one stream."""

    def elapsed_time(self, end: "Event") -> float:
        return 0.0


class Stream:
    """torch.cuda.Stream; whatever is put on one is executed in the program's order."""

    cuda_stream = stream_id = 0
    device_type = 1  # CUDA's number

    def __init__(self, device: Any = None, priority: int = 0, **kwargs: object) -> None:
        self.device = with_index("cuda" if device is None else _device(device))
        self.device_index = self.device.index

    def synchronize(self) -> None:
        RECORD.wait("a stream")
        QUEUE.wait()

    def query(self) -> bool:
        return QUEUE.done(QUEUE.mark())

    def is_capturing(self) -> bool:
        return False

    def record_event(self, event: Event | None = None) -> Event:
        event = event or Event()
        event.record(self)
        return event

    def wait_event(self, event: Event) -> None: ...

    def wait_stream(self, stream: "Stream") -> None: ...

    def __enter__(self) -> "Stream":
        return self

    def __exit__(self, *error: object) -> None: ...


def _device(device: Any) -> torch.device:
    return torch.device("cuda", device) if isinstance(device, int) else torch.device(device)


def _replace(module: Any, **replacements: Any) -> None:
    for name, replacement in replacements.items():
        setattr(module, name, replacement)


def _always(value: Any) -> Callable[..., Any]:
    return lambda *args, **kwargs: value


def _synchronize(device: object = None) -> None:
    RECORD.wait("the device")
    QUEUE.wait()


def _replace_cuda(gpus: Sequence[int]) -> None:
    def properties(device: Any = None) -> SimpleNamespace:
        index = with_index("cuda" if device is None else _device(device)).index
        return SimpleNamespace(
            name="pretended GPU",
            major=9,
            minor=0,
            total_memory=80 * GIB,
            multi_processor_count=132,
            uuid=uuid.UUID(int=gpus[index] + 1),
        )

    stream = Stream("cuda:0")
    _replace(
        torch.cuda,
        _lazy_init=_always(None),
        is_initialized=_always(True),
        is_available=_always(True),
        device_count=_always(len(gpus)),
        synchronize=_synchronize,
        is_bf16_supported=_always(True),
        is_current_stream_capturing=_always(False),
        get_device_properties=properties,
        get_device_name=_always("pretended GPU"),
        get_device_capability=_always((9, 0)),
        Event=Event,
        Stream=Stream,
        stream=lambda stream: stream or contextlib.nullcontext(),
        current_stream=_always(stream),
        default_stream=_always(stream),
        set_stream=_always(None),
        empty_cache=_always(None),
        memory_allocated=_always(GIB),
        max_memory_allocated=_always(GIB),
        memory_reserved=_always(GIB),
        max_memory_reserved=_always(GIB),
        mem_get_info=_always((79 * GIB, 80 * GIB)),
        memory_stats=_always({}),
        reset_peak_memory_stats=_always(None),
        manual_seed=_always(None),
        manual_seed_all=_always(None),
        get_rng_state=lambda device=None: torch.get_rng_state(),
        set_rng_state=lambda state, device=None: torch.set_rng_state(state),
        get_rng_state_all=_always([]),
        set_rng_state_all=_always(None),
    )


def _replace_accelerator(count: int) -> None:
    cuda = torch.device("cuda")
    _replace(
        torch.accelerator,
        is_available=_always(True),
        current_accelerator=_always(cuda),
        device_count=_always(count),
        current_device_index=torch.cuda.current_device,
        set_device_index=torch.cuda.set_device,
        set_device_idx=torch.cuda.set_device,
        synchronize=_synchronize,
        current_stream=torch.cuda.current_stream,
    )


def _replace_pinned_memory() -> None:
    """In every thread: a loader pins what its processes have read in one of its own."""

    def pin_memory(self: Tensor, device: object = None) -> Tensor:
        if isinstance(self, GpuTensor):
            raise RuntimeError("cannot pin a CUDA tensor: only dense CPU tensors can be pinned")
        return self if self in PINNED else PINNED.add(self.clone())

    _replace(Tensor, pin_memory=pin_memory, is_pinned=lambda self, device=None: self in PINNED)


def _replace_nccl() -> None:
    """Gloo carries what NCCL would."""
    init, new = torch.distributed.init_process_group, torch.distributed.new_group

    def init_process_group(backend: str | None = None, *args: Any, **kwargs: Any) -> None:
        init(str(backend).replace("nccl", "gloo"), *args, **kwargs)

    def new_group(ranks: Any = None, timeout: Any = None, backend: str | None = None, **kwargs: Any) -> Any:
        return new(ranks, timeout, backend and backend.replace("nccl", "gloo"), **kwargs)

    for module in (torch.distributed, distributed_c10d):
        _replace(module, init_process_group=init_process_group, new_group=new_group)
