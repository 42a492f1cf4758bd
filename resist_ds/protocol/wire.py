"""The compact wire: how values are written for their journey, as pure functions of tensors.

A code writes float32 values as bytes, most of them in blocks of 256, and reads them back:

    INT4   a block's values, 64, in steps of 1/7 of its largest: two in a byte, and the step as a bfloat16
    INT8   a block's values in steps of 1/127 of its largest: 256 × int8, and the step as a float32
    LOG8   values ≥ 0 to 3 bits behind the leading one, down from the largest: 256 × uint8, and the largest
    BF16   bfloat16, rounded up or down at random, so that its mean is the value; 2 bytes each

What was read and is written again comes out the same: so the owner of a piece, who keeps what it read of its
own writing, holds what everybody else does. Nothing here communicates. (Rounding errors that are kept and
added the next time: "1-bit SGD", Seide et al., 2014; pseudo-gradients in few bits: arXiv 2501.18512.)
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cache
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from resist_ds.errors import UserError
from resist_ds.protocol.partition import key

BLOCK = 256  # values that share a scale
SCALE = 4  # bytes of it
HALVES = 64  # values that share a scale where each has half a byte
TINY = 2.0**-126  # the smallest normal float32: below it a reciprocal may overflow
PERIOD = 1 << 16  # values whose random bits are mixed from one table


class Code(Protocol):
    """A way to write float32 values as bytes.

    Attributes:
        random: whether it rounds at random.
    """

    random: bool

    def nbytes(self, numel: int) -> int:
        """Bytes of so many values; of a multiple of 256, where the next ones begin."""

    def encode(self, values: Tensor, noise: Tensor | None = None) -> Tensor:
        """uint8 [nbytes(n)] of values float32 [n].

        Args:
            noise: int32 [n] in [−32768, 32768), for a code that rounds at random; None: to the nearest.
        """

    def decode(self, wire: Tensor, numel: int) -> Tensor:
        """float32 [numel] of what `encode` has written."""


class _Scaled(ABC):
    """A byte for each value and four for what a block of them shares; the last block may be shorter."""

    random = False

    def nbytes(self, numel: int) -> int:
        return numel + SCALE * -(-numel // BLOCK)

    def encode(self, values: Tensor, noise: Tensor | None = None) -> Tensor:
        wire = values.new_empty(self.nbytes(len(values)), dtype=torch.uint8)
        for rows, place in _rows(values, wire):
            self._write(rows, place)
        return wire

    def decode(self, wire: Tensor, numel: int) -> Tensor:
        values = wire.new_empty(numel, dtype=torch.float32)
        for rows, place in _rows(values, wire):
            self._read(place, rows)
        return values

    @abstractmethod
    def _write(self, rows: Tensor, place: Tensor) -> None:
        """Write rows [blocks, size] to uint8 [blocks, size + 4]."""

    @abstractmethod
    def _read(self, place: Tensor, rows: Tensor) -> None:
        """Read what `_write` has written."""


def _rows(values: Tensor, wire: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Views of whole blocks, [blocks, 256] and [blocks, 260], and of the shorter one behind them, if any."""
    whole = len(values) // BLOCK
    cut, at = whole * BLOCK, whole * (BLOCK + SCALE)
    found = []
    if whole:
        found.append((values[:cut].view(whole, BLOCK), wire[:at].view(whole, BLOCK + SCALE)))
    if cut < len(values):
        found.append((values[cut:].view(1, -1), wire[at:].view(1, -1)))
    return found


def _shared(place: Tensor) -> Tensor:
    """What the values of each block share, uint8 [blocks, 4], where a number of 4 bytes may begin."""
    return place[:, -SCALE:].clone(memory_format=torch.contiguous_format)


def _in_steps(rows: Tensor, most: int, cut: int) -> tuple[Tensor, Tensor]:
    """Rows [blocks, size] in whole steps of a `most`th of each one's largest, and the steps [blocks].

    Args:
        cut: steps are rounded up to multiples of it, as integers of their bits: `most` of them are then a
            float32 again, whose `most`th part is this step.
    """
    size = rows.abs()
    step = (size.amax(1) / most).view(torch.int32).add_(cut - 1).bitwise_and_(-cut).view(torch.float32)
    inverse = torch.where(step >= TINY, 1 / step, 0)
    step = torch.where(step >= TINY, step, 0)
    return torch.mul(rows, inverse[:, None], out=size).round_(), step


class _Int8(_Scaled):
    def _write(self, rows: Tensor, place: Tensor) -> None:
        steps, step = _in_steps(rows, 127, 1 << 7)
        place[:, :-SCALE].view(torch.int8).copy_(steps)
        place[:, -SCALE:] = step[:, None].view(torch.uint8)

    def _read(self, place: Tensor, rows: Tensor) -> None:
        rows.copy_(place[:, :-SCALE].view(torch.int8))
        rows *= _shared(place).view(torch.float32)


class _Log8(_Scaled):
    def _write(self, rows: Tensor, place: Tensor) -> None:
        rounded = rows.view(torch.int32).add(1 << 19).bitwise_right_shift_(20)
        top = rounded.amax(1, keepdim=True)
        code = (rounded - top + 255).clamp_(1, 255)
        place[:, :-SCALE].copy_(torch.where(rows > 0, code, 0))
        place[:, -SCALE:] = top.view(torch.uint8)

    def _read(self, place: Tensor, rows: Tensor) -> None:
        code = place[:, :-SCALE].to(torch.int32)
        top = _shared(place).view(torch.int32)
        values = (code + (top - 255)).clamp_(min=1).bitwise_left_shift_(20).view(torch.float32)
        rows.copy_(torch.where(code > 0, values, 0))


class _Int4:
    """Half a byte for each of 64 values, two for what they share; zeros fill up the last block."""

    random = False

    def nbytes(self, numel: int) -> int:
        return (HALVES // 2 + 2) * -(-numel // HALVES)

    def encode(self, values: Tensor, noise: Tensor | None = None) -> Tensor:
        short = -len(values) % HALVES
        rows = (F.pad(values, (0, short)) if short else values).view(-1, HALVES)
        steps, step = _in_steps(rows, 7, 1 << 16)
        both = torch.add(steps[:, : HALVES // 2], steps[:, HALVES // 2 :], alpha=16)  # −119 … 119
        wire = values.new_empty(len(rows), HALVES // 2 + 2, dtype=torch.uint8)
        wire[:, :-2].view(torch.int8).copy_(both)
        wire[:, -2:] = step.to(torch.bfloat16)[:, None].view(torch.uint8)
        return wire.view(-1)

    def decode(self, wire: Tensor, numel: int) -> Tensor:
        place = wire.view(-1, HALVES // 2 + 2)
        both = place[:, :-2].view(torch.int8).to(torch.float32)
        step = place[:, -2:].clone(memory_format=torch.contiguous_format).view(torch.bfloat16)
        rows = wire.new_empty(len(place), HALVES, dtype=torch.float32)
        high = torch.mul(both, 1 / 16, out=rows[:, HALVES // 2 :]).round_()  # the lower is below a half of it
        torch.add(both, high, alpha=-16, out=rows[:, : HALVES // 2])
        rows *= step
        return rows.view(-1)[:numel]


class _BF16:
    random = True

    def nbytes(self, numel: int) -> int:
        return 2 * numel

    def encode(self, values: Tensor, noise: Tensor | None = None) -> Tensor:
        if noise is not None:  # half a step more, and the noise, and no step's fraction is left to round
            bits = (noise + values.view(torch.int32)).add_(1 << 15).bitwise_and_(-1 << 16)
            values = bits.view(torch.float32)
        return values.to(torch.bfloat16).view(torch.uint8)

    def decode(self, wire: Tensor, numel: int) -> Tensor:
        return wire.view(torch.bfloat16).to(torch.float32)


INT4: Code = _Int4()
INT8: Code = _Int8()
LOG8: Code = _Log8()
BF16: Code = _BF16()

_OF_STATE = {"momentum_buffer": INT8, "exp_avg": INT8, "exp_avg_sq": LOG8}


def code_of_state(kind: str, *, shared: bool) -> Code:
    """The code of an optimizer's state. Raises `UserError` for one that nobody has chosen a code for."""
    if kind == "momentum_buffer" and shared:
        return INT4  # it is most of what would travel, and the mean over all workers
    if kind not in _OF_STATE:
        raise UserError(
            f"--wire compact does not know an optimizer's {kind}: type --wire exact, or --optimizer_state "
            "reset"
        )
    return _OF_STATE[kind]


@dataclass(frozen=True)
class Noise:
    """Random bits of a piece's journey, the same wherever they are asked for.

    Args:
        draw: that of the deal, see `Partition`.
        stage: of the synchronisation, "aggregate" or "hand_off".
        piece, worker: what is written, and by whom.
    """

    draw: int
    stage: str
    piece: int
    worker: int

    def bits(self, start: int, numel: int, device: torch.device) -> Tensor:
        """int32 [numel], uniform in [−32768, 32768), of the values from `start` (even) on."""
        salt = key(self.draw, self.stage, self.piece, self.worker)
        bits = torch.empty(numel // 2 + numel % 2, dtype=torch.int32, device=device)
        table = _table(device)
        begin = start // 2
        done = 0
        while done < len(bits):  # once, mostly
            turn, at = divmod(begin + done, len(table))
            size = min(len(table) - at, len(bits) - done)
            part = bits[done : done + size]
            torch.bitwise_xor(table[at : at + size], _int32(salt + turn * 0x9E3779B97F4A7C15), out=part)
            part *= _ODD[0]
            part ^= (part >> 15).bitwise_and_(0x1FFFF)  # shifted in are zeros, and no signs
            part *= _ODD[1]
            done += size
        return bits.view(torch.int16)[:numel].to(torch.int32)


_ODD = -1640531527, -1028477379  # factors that mix well: 2³² by the golden ratio, and one of xxHash's


def _int32(number: int) -> int:
    """The upper half of 64 bits, as a signed integer."""
    upper = (number >> 32) & 0xFFFFFFFF
    return upper - (1 << 32) if upper >> 31 else upper


@cache
def _table(device: torch.device) -> Tensor:
    """int32 [PERIOD / 2]: a hash of each index (multiplications and shifts, as in murmur3)."""
    x = torch.arange(1, PERIOD // 2 + 1, dtype=torch.int64)
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1)):
        x = ((x ^ (x >> shift)) * factor) & 0xFFFFFFFF
    return (x - ((x >> 31) << 32)).to(torch.int32).to(device)
