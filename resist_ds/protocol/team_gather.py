"""Inside a team: what each lane has synchronised of vectors that all ranks of the team hold comes together.

A synchronisation runs along lanes, each carrying its slice of every part (`pieces`); behind it the ranks of a
team bring each other their slices, over the fast links between them.
"""

from collections.abc import Mapping, Sequence

from torch import Tensor

from resist_ds.comm import Comm
from resist_ds.nets.subnet import StateLayout
from resist_ds.protocol.partition import Layout
from resist_ds.protocol.pieces import Pieces

KIND = "team"  # of the ledger: bytes that stay inside a team


class TeamGather:
    """Gathers slices of this rank's workers' vectors from its team.

    Args:
        state: of a vector.
    """

    def __init__(self, comm: Comm, layout: Layout, state: StateLayout):
        self._comm = comm
        self._lane = layout.lane_of(comm.rank)
        first = comm.rank - self._lane
        self._ranks = range(first, first + layout.team_size)
        self._turns = layout.most_workers
        self._state = state

    def run(self, vectors: Mapping[int, Tensor], groups: Sequence[Pieces], transit: Tensor) -> None:
        """Bring every lane's slices here, and this lane's to the others. Collective: all ranks.

        Args:
            groups: of what has been synchronised.
            transit: the exchange buffer; slices go through it where vectors lie where it does not.
        """
        numel = len(next(iter(vectors.values())))
        parts = [(offset, group.lanes) for group in groups for offset in self._offsets(group, numel)]
        played = list(vectors.values())
        for turn in range(self._turns):  # a team that plays fewer workers takes part in its others' exchanges
            vector = played[turn] if turn < len(played) else None
            if next(iter(played)).device == self._comm.buffer_device:
                self._exchange([] if vector is None else [_slices(vector, *part) for part in parts])
                continue
            for offset, lanes in parts:
                longest = lanes[0][1] - lanes[0][0]
                step = max(1, min(longest, transit.numel() // len(lanes)))
                for at in range(0, longest, step):
                    cut = tuple((min(lo + at, hi), min(lo + at + step, hi)) for lo, hi in lanes)
                    self._through(None if vector is None else _slices(vector, offset, cut), transit, step)

    def _offsets(self, group: Pieces, numel: int) -> Sequence[int]:
        """Where the parts that a group's pieces are of begin in a vector."""
        if group.of == "shared":
            return (0,)
        slots = (numel - self._state.shared.numel) // self._state.block.numel
        return [self._state.slot_offset(slot) for slot in range(slots)]

    def _through(self, here: Sequence[Tensor] | None, transit: Tensor, step: int) -> None:
        """The same for slices that lie elsewhere than exchange buffers. Collective: all ranks."""
        if here is None:
            self._exchange([])
            return
        there = [transit[i * step : i * step + len(part)] for i, part in enumerate(here)]
        there[self._lane].copy_(here[self._lane], non_blocking=True)
        self._exchange([there])
        for lane, part in enumerate(here):
            if lane != self._lane:
                part.copy_(there[lane], non_blocking=True)

    def _exchange(self, parts: Sequence[Sequence[Tensor]]) -> None:
        """Send this lane's slice of each part to the others, and receive theirs. Collective: all ranks."""
        sends, receives = [], []
        for slices in parts:
            for lane, rank in enumerate(self._ranks):
                if lane == self._lane:
                    continue
                if len(slices[self._lane]):
                    sends.append((slices[self._lane], rank))
                if len(slices[lane]):
                    receives.append((slices[lane], rank))
        self._comm.exchange(sends, receives, KIND)


def _slices(vector: Tensor, offset: int, lanes: Sequence[tuple[int, int]]) -> list[Tensor]:
    """Views of each lane's slice of the part that begins at `offset`."""
    return [vector[offset + lo : offset + hi] for lo, hi in lanes]
