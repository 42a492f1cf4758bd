"""Groups of pieces that travel in a code: what is written, averaged and read of them. No communication.

A holder writes, the owner reads what the others have written and takes the mean; when it hands that on, it
keeps what the others will read. Of shared's parameters travel the differences from a reference that all
workers agree on, and what rounding takes from them is kept, and added the next time.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from resist_ds.memory import host_bytes
from resist_ds.protocol.partition import Move, Partition
from resist_ds.protocol.pieces import Pieces
from resist_ds.protocol.wire import Code, Noise

Parcels = Mapping[tuple[int, int], Tensor]
"""{(piece, worker that has written it): uint8}."""


@dataclass(frozen=True)
class Pass:
    """Elements [lo, hi) of every piece: what one pass of an exchange carries.

    Attributes:
        vectors: of this rank's workers.
        deal: by which pieces lie in them.
    """

    vectors: Mapping[int, Tensor]
    deal: Partition
    lo: int
    hi: int

    def of(self, group: Pieces, piece: int, worker: int) -> Tensor:
        """View of what a worker has of a piece."""
        return group.slice(self.vectors[worker], piece, worker, self.deal, self.lo, self.hi)


CHUNK = 1 << 17  # values written or read at a time on a CPU: a multiple of a code's blocks


class Coder:
    """Writes, averages and reads the pieces of a group.

    Args:
        group: that has a code.
        mine: workers that this rank plays.
        device: that computes; vectors and parcels lie there or in host memory, pinned where that is a GPU.
        chunk: values at a time, a multiple of a code's blocks.
    """

    def __init__(self, group: Pieces, mine: Sequence[int], device: torch.device, chunk: int = CHUNK):
        assert group.code is not None
        self.group = group
        self.code: Code = group.code
        self._mine = mine
        self._device = device
        self._chunk = chunk

    def write(self, now: Pass, piece: int, worker: int, stage: str, room: Tensor | None) -> None:
        """Write what a worker has of a piece into `room`.

        Args:
            stage: "aggregate"; or "hand_off": then the worker keeps what the others will read.
            room: None: nobody will; it is kept as if.
        """
        values = now.of(self.group, piece, worker)
        noise = Noise(now.deal.draw, stage, piece, worker)
        for at, part in self._parts(values):
            written = self._encode(part, noise, now.lo + at)
            if room is not None:
                self._put(room, at, written)
            if stage == "hand_off":
                values[at : at + len(part)].copy_(self.code.decode(written, len(part)), non_blocking=True)

    def average(self, now: Pass, piece: int, owner: int, holders: Sequence[int], parcels: Parcels) -> None:
        """Leave the mean over `holders`, in their order, with the owner.

        The owner's own values are as they are. In float32: what can be written has so few bits that the mean
        of n equal values keeps them all.
        """
        if tuple(holders) == (owner,):
            return
        out = now.of(self.group, piece, owner)
        for at, own in self._parts(out):
            mean = self._mean(own, piece, owner, holders, parcels, at)
            out[at : at + len(own)].copy_(mean, non_blocking=True)

    def place(self, then: Pass, moves: Sequence[Move], parcels: Parcels) -> None:
        """Read what this rank's workers hold in the next round."""
        for move in (m for m in moves if (m.piece, m.source) in parcels):
            for worker in (w for w in move.targets if w in self._mine):
                place = then.of(self.group, move.piece, worker)
                parcel = parcels[move.piece, move.source]
                for at in range(0, len(place), self._chunk):
                    part = place[at : at + self._chunk]
                    part.copy_(self._read(parcel, at, len(part)), non_blocking=True)

    def _mean(
        self, own: Tensor, piece: int, owner: int, holders: Sequence[int], parcels: Parcels, at: int
    ) -> Tensor:
        total: Tensor | None = None
        for worker in holders:
            part = own if worker == owner else self._read(parcels[piece, worker], at, len(own))
            total = part if total is None else torch.add(total, part, out=None if total is own else total)
        assert total is not None
        # By a tensor: by a number a GPU multiplies by its reciprocal, which may miss the last bit.
        return torch.div(total, total.new_full((), len(holders)), out=None if total is own else total)

    def _encode(self, values: Tensor, noise: Noise, start: int) -> Tensor:
        """Written values; `start`: of the first in its piece."""
        bits = noise.bits(start, len(values), self._device) if self.code.random else None
        return self.code.encode(values, bits)

    def _put(self, room: Tensor, at: int, written: Tensor) -> None:
        place = self.code.nbytes(at)
        room[place : place + len(written)].copy_(written, non_blocking=True)

    def _read(self, parcel: Tensor, at: int, numel: int) -> Tensor:
        """Values [at, at + numel) of a parcel, on the device."""
        written = parcel[self.code.nbytes(at) : self.code.nbytes(at + numel)]
        return self.code.decode(self._here(written), numel)

    def _parts(self, values: Tensor) -> Iterator[tuple[int, Tensor]]:
        """(where it begins, a part on the device) of some values."""
        for at in range(0, len(values), self._chunk):
            yield at, self._here(values[at : at + self._chunk])

    def _here(self, tensor: Tensor) -> Tensor:
        return tensor.to(self._device, non_blocking=True)


class Differences(Coder):
    """Of a group of shared: differences from what all workers agreed on travel, and errors are kept.

    Attributes:
        reference: {worker: [n]} what all agreed on; equal on all workers.
        error: {worker: [n]} what rounding has taken so far: in a worker's own chunk from what it handed off
            as the owner, elsewhere from what it sent to the owner.
    """

    def __init__(
        self,
        group: Pieces,
        mine: Sequence[int],
        device: torch.device,
        chunk: int,
        vectors: Mapping[int, Tensor],
    ):
        super().__init__(group, mine, device, chunk)
        pinned = device.type == "cuda"
        self._range = group.start(0, 0, _NOBODY), sum(group.lengths)
        self.reference, self.error = {}, {}
        for worker in mine:
            values = vectors[worker].narrow(0, *self._range)
            self.reference[worker] = torch.empty(len(values), pin_memory=pinned).copy_(values)
            self.error[worker] = torch.zeros(len(values), pin_memory=pinned)

    @property
    def nbytes(self) -> int:
        """Host memory of what is kept."""
        return sum(host_bytes(t) for kept in (self.reference, self.error) for t in kept.values())

    def write(self, now: Pass, piece: int, worker: int, stage: str, room: Tensor | None) -> None:
        """Write a worker's difference in a chunk, or, in a hand-off, the owner's mean difference."""
        values = now.of(self.group, piece, worker)
        reference, error = self._kept(worker, piece, now.lo, len(values))
        for at, change in self._parts(error):
            span = slice(at, at + len(change))
            if stage == "aggregate":
                change = torch.sub(self._here(values[span]), self._here(reference[span])).add_(change)
            written = self.code.encode(change)
            assert room is not None  # a chunk of shared always has somebody to go to
            self._put(room, at, written)
            read = self.code.decode(written, len(change))
            error[span].copy_(torch.sub(change, read, out=read), non_blocking=True)

    def average(self, now: Pass, piece: int, owner: int, holders: Sequence[int], parcels: Parcels) -> None:
        """Add the mean difference to what the owner has kept: that is what it hands off."""
        values = now.of(self.group, piece, owner)
        reference, error = self._kept(owner, piece, now.lo, len(values))
        for at, kept in self._parts(error):
            span = slice(at, at + len(kept))
            own = self._here(values[span]) - self._here(reference[span])
            mean = self._mean(own, piece, owner, holders, parcels, at)
            error[span].copy_(kept + mean, non_blocking=True)

    def place(self, then: Pass, moves: Sequence[Move], parcels: Parcels) -> None:
        """Bring the reference of each of this rank's workers up to date, and make it what they hold."""
        for (piece, _), parcel in parcels.items():
            length = self.group.length(piece, then.lo, then.hi)
            for at in range(0, length, self._chunk):
                change = self._read(parcel, at, min(self._chunk, length - at))
                new: Tensor | None = None
                for worker in self._mine:
                    reference, _ = self._kept(worker, piece, then.lo + at, len(change))
                    new = change.add_(self._here(reference)) if new is None else new  # all agree on it
                    reference.copy_(new, non_blocking=True)
                    place = then.of(self.group, piece, worker)
                    place[at : at + len(change)].copy_(new, non_blocking=True)

    def _kept(self, worker: int, piece: int, lo: int, length: int) -> tuple[Tensor, Tensor]:
        """Views of a worker's reference and error."""
        start = self.group.start(piece, worker, _NOBODY) - self._range[0] + lo
        return (
            self.reference[worker].narrow(0, start, length),
            self.error[worker].narrow(0, start, length),
        )


_NOBODY = Partition((), ())  # where a chunk of shared lies depends on no deal
