"""The oracle's synchronisation: what all workers agree on after a round, exact or compact, in plain numpy.

Written from the description of the wire alone: no code of the package's codec or exchange, no ranks, no
slices, no messages. Tensors go by timm's names; the pieces of shared are parts of one long vector of them.
From the package come only the random bits of the stochastic rounding, which are *given*, as deals are.
"""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from resist_ds.protocol.partition import Partition
from resist_ds.protocol.wire import Noise

State = dict[str, dict[str, Tensor]]
"""{timm name: {"parameter": ..., and what the optimizer keeps: ...}}."""

BLOCK = 256  # elements under one scale
ALIGNMENT = 32  # elements at whose multiples tensors begin
VECTORS = ("momentum_buffer", "exp_avg", "exp_avg_sq")  # what an optimizer keeps of a parameter's shape


def mean(values: Sequence[np.ndarray], dtype: type = np.float64) -> np.ndarray:
    """Σ / n, in the order given and with the bits given."""
    total = values[0].astype(dtype)
    for value in values[1:]:
        total = total + value
    return np.asarray(total / len(values), values[0].dtype)


# ------------------------------------------------------------------------------------------------------------
# Codes: what is left of float32 values [n] when they have been written down and read again


def rounded_int8(x: np.ndarray) -> np.ndarray:
    """A signed byte each, in units of 1/127 of the largest in the block (of a mantissa of 16 bits)."""
    blocks = _blocks(x)
    units = int8_units(x)[:, None]
    inverse = np.divide(np.float32(1), units, where=units > 0, out=np.zeros_like(units))
    return (np.rint(blocks * inverse) * units).reshape(-1)[: len(x)]


def int8_units(x: np.ndarray) -> np.ndarray:
    """The scale of each block [⌈n/256⌉]."""
    units = np.abs(_blocks(x)).max(axis=1) / np.float32(127)
    units = np.where(units < np.float32(2.0**-126), np.float32(0), units)
    words = units.view(np.uint32).astype(np.uint64)
    return (-(-words // 128) * 128).astype(np.uint32).view(np.float32)  # up, seven bits shorter


def rounded_int4(x: np.ndarray) -> np.ndarray:
    """Four bits each, −7 … 7, in units of 1/7 of the largest of 64, itself cut to bf16 upwards."""
    blocks = np.pad(x, (0, -len(x) % 64)).reshape(-1, 64)
    units = np.abs(blocks).max(axis=1, keepdims=True) / np.float32(7)
    words = units.view(np.uint32).astype(np.uint64)
    units = (-(-words // 65536) * 65536).astype(np.uint32).view(np.float32)
    units = np.where(units < np.float32(2.0**-126), np.float32(0), units)
    inverse = np.divide(np.float32(1), units, where=units > 0, out=np.zeros_like(units))
    return (np.rint(blocks * inverse) * units).reshape(-1)[: len(x)]


def rounded_log8(x: np.ndarray) -> np.ndarray:
    """Eight values an octave, for x ≥ 0: 255 steps down from the block's largest, and 0."""
    blocks = _blocks(x)
    eighths = (blocks.view(np.uint32).astype(np.int64) + 2**19) >> 20  # of octaves, to the nearest
    top = eighths.max(axis=1, keepdims=True)
    kept = np.maximum(np.maximum(eighths, top - 254), 1)
    values = (kept.astype(np.uint32) << 20).view(np.float32)
    return np.where(blocks == 0, np.float32(0), values).reshape(-1)[: len(x)]


def rounded_bf16(x: np.ndarray, random: np.ndarray) -> np.ndarray:
    """The bf16 below or above (of its magnitude), as 16 random bits say."""
    words = np.ascontiguousarray(x).view(np.uint32).astype(np.uint64) + random.astype(np.uint64)
    return (words & 0xFFFF0000).astype(np.uint32).view(np.float32)


SHARED_STATE = {"momentum_buffer": rounded_int4, "exp_avg": rounded_int8, "exp_avg_sq": rounded_log8}


def _blocks(x: np.ndarray) -> np.ndarray:
    """[⌈n/256⌉, 256]; zeros at the end change no scale."""
    assert x.dtype == np.float32
    return np.pad(x, (0, -len(x) % BLOCK)).reshape(-1, BLOCK)


def given_bits(deal: Partition, stage: str, block: int, worker: int, n: int) -> np.ndarray:
    """The package's random bits [n], in 0 … 65535, of a pool block that `worker` writes down in a round."""
    return Noise(deal.draw, stage, block, worker).bits(0, n, torch.device("cpu")).numpy() + 32768


# ------------------------------------------------------------------------------------------------------------
# Synchronisations


class Exact:
    """Every tensor's mean over its holders.

    Args:
        travel: whether optimizer state takes part.
    """

    def __init__(self, travel: bool):
        self.travel = travel

    def agree(self, ends: Sequence[State], deal: Partition, dropped: frozenset[int] = frozenset()) -> State:
        """What all are to hold, of the workers' states at the end of a round.

        Args:
            dropped: workers that do not count; what nobody else holds is as they have it (at the start).
        """
        agreed: State = {}
        for name in {name: None for end in ends for name in end}:
            held = [w for w, end in enumerate(ends) if name in end]
            held = [w for w in held if w not in dropped] or held[:1]
            kinds = ends[held[0]][name] if self.travel else ("parameter",)
            agreed[name] = {
                kind: torch.from_numpy(mean([ends[w][name][kind].detach().numpy() for w in held]))
                for kind in kinds
            }
        return agreed


class Compact(Exact):
    """The same, of what arrives: of tensors with two and more dimensions that is a quarter of the bits.

    Args:
        initial: the global model at the start; what all workers first agree on.
        pool: timm's prefixes of the pool blocks.
    """

    def __init__(self, travel: bool, workers: int, initial: State, pool: Sequence[str]):
        super().__init__(travel)
        self.workers = workers
        matrices = [name for name, of in initial.items() if of["parameter"].ndim >= 2]
        self.blocks = [[name for name in matrices if name.startswith(prefix)] for prefix in pool]
        self.shared = [name for name in matrices if not name.startswith(tuple(pool))]
        self.reference = _flat(initial, self.shared, "parameter")
        # Of each worker; in the chunk that it owns, the error of what it has sent back to all.
        self.errors = np.zeros((workers, len(self.reference)), np.float32)
        size = -(-len(self.reference) // workers)
        size = -(-size // BLOCK) * BLOCK
        self.chunks = [slice(owner * size, (owner + 1) * size) for owner in range(workers)]

    def agree(self, ends: Sequence[State], deal: Partition, dropped: frozenset[int] = frozenset()) -> State:
        agreed = super().agree(ends, deal, dropped)
        if self.workers == 1:  # nothing travels
            return agreed
        kinds = [kind for kind in ("parameter", *VECTORS) if kind in next(iter(agreed.values()))]
        for kind in kinds:
            for block, names in enumerate(self.blocks):
                holders = [w for w, held in enumerate(deal.blocks) if block in held]
                counted = [w for w in holders if w not in dropped] or [deal.owners[block]]
                values = {w: _flat(ends[w], names, kind) for w in counted}
                agree = self._block(kind, deal, block, values)
                _spread(agreed, names, kind, agree)
            counted = [w for w in range(self.workers) if w not in dropped]
            if kind == "parameter":
                self._shared_parameters(counted, ends)
                _spread(agreed, self.shared, kind, self.reference)
            else:
                whole = np.zeros_like(self.reference)
                for owner, chunk in enumerate(self.chunks):
                    values = {w: _flat(ends[w], self.shared, kind)[chunk] for w in (counted or [owner])}
                    arrives = SHARED_STATE[kind]
                    whole[chunk] = self._averaged(arrives, owner, values)
                _spread(agreed, self.shared, kind, whole)
        return agreed

    def _block(self, kind: str, deal: Partition, block: int, values: Mapping[int, np.ndarray]) -> np.ndarray:
        owner = deal.owners[block]
        if kind != "parameter":
            return self._averaged(rounded_log8 if kind == "exp_avg_sq" else rounded_int8, owner, values)

        def arrives(x: np.ndarray, stage: str, worker: int) -> np.ndarray:
            return rounded_bf16(x, given_bits(deal, stage, block, worker, len(x)))

        arrived = [x if w == owner else arrives(x, "aggregate", w) for w, x in values.items()]
        return arrives(mean(arrived, np.float32), "hand_off", owner)

    @staticmethod
    def _averaged(
        arrives: Callable[[np.ndarray], np.ndarray], owner: int, values: Mapping[int, np.ndarray]
    ) -> np.ndarray:
        """Optimizer state: the mean of the owner's own and what reaches it, as it reaches everybody."""
        return arrives(mean([x if w == owner else arrives(x) for w, x in values.items()], np.float32))

    def _shared_parameters(self, counted: Sequence[int], ends: Sequence[State]) -> None:
        """Differences from the reference, and what was lost of them the last time."""
        now = [_flat(end, self.shared, "parameter") for end in ends]
        for owner, chunk in enumerate(self.chunks):
            arrived = []
            for w in counted:
                difference = now[w][chunk] - self.reference[chunk]
                if w != owner:
                    meant = difference + self.errors[w, chunk]
                    difference = rounded_int8(meant)
                    self.errors[w, chunk] = meant - difference
                arrived.append(difference)
            meant = self.errors[owner, chunk] + (mean(arrived, np.float32) if arrived else np.float32(0))
            found = rounded_int8(meant)
            self.errors[owner, chunk] = meant - found
            self.reference[chunk] += found


def _flat(state: State, names: Sequence[str], kind: str) -> np.ndarray:
    """One vector of named tensors, each of which begins at a multiple of 32 elements."""
    flat = [state[name][kind].detach().numpy().reshape(-1) for name in names]
    return np.concatenate([np.zeros(0, np.float32), *(np.pad(x, (0, -len(x) % ALIGNMENT)) for x in flat)])


def _spread(state: State, names: Sequence[str], kind: str, vector: np.ndarray) -> None:
    """Put `_flat`'s vector back into the tensors."""
    at = 0
    for name in names:
        like = state[name][kind]
        state[name][kind] = torch.from_numpy(vector[at : at + like.numel()].copy()).view(like.shape)
        at += like.numel() + -like.numel() % ALIGNMENT
