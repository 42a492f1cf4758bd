"""Inside a team whose ranks hold a worker in parts: whole tensors, brought to the lanes that ask for them.

In training nobody holds a whole tensor but while it is computed with. Between rounds an evaluation needs the
shared part, and a checkpoint's files hold whole tensors: these come together here, a piece at a time.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from resist_ds.comm import Comm
from resist_ds.nets.blueprint import Blueprint
from resist_ds.nets.shards import join
from resist_ds.nets.subnet import PartLayout, StateDict, StateLayout
from resist_ds.protocol.partition import Layout, Partition
from resist_ds.protocol.team_gather import KIND
from resist_ds.protocol.writers import Writers

AT_ONCE = 1 << 22  # elements of whole tensors that one exchange brings; one tensor at least


@dataclass(frozen=True)
class Journey:
    """One tensor's way to some lanes.

    Attributes:
        part: this lane's rows of it, in their place.
        lanes: that are to have it whole.
        out: where it comes together, if this lane is one of them.
    """

    part: Tensor
    lanes: tuple[int, ...]
    out: Tensor | None


class TeamShards:
    """Puts whole tensors together from the parts that this rank's team holds.

    Args:
        state: of a lane's vector.
    """

    def __init__(self, comm: Comm, layout: Layout, blueprint: Blueprint, state: StateLayout):
        self._comm = comm
        self._layout = layout
        self._blueprint = blueprint
        self._state = state
        self._lane, self._lanes = layout.lane_of(comm.rank), layout.team_size

    def shared(self, part: Tensor, out: Tensor) -> None:
        """Bring the shared parameters to every lane. Collective: all ranks.

        Args:
            part: this lane's vector of shared.
            out: laid out as the parameters of a whole one, without optimizer state.
        """
        everyone = tuple(range(self._lanes))
        here, there = self._state.shared, self._state.whole().without_state().shared
        parts, outs = here.views(part), there.views(out)
        for names in _batches(there):
            self._bring([Journey(parts[name], everyone, outs[name]) for name in names])

    def owned(
        self, vectors: Mapping[int, Tensor], deal: Partition, agreed: Mapping[int, Tensor] | None = None
    ) -> StateDict:
        """What this rank writes of what its team's workers own, whole, in host memory. Collective: all ranks.

        Args:
            vectors: this lane's, of the team's workers.
            agreed: as for `owned` of whole vectors.
        """
        state, prefix = self._state, self._blueprint.block_prefix
        writers = Writers(state, deal, self._lanes)
        found: StateDict = {}
        parts = {w: state.shared.tensors(state.shared_part(v)) for w, v in (agreed or vectors).items()}
        for names in _batches(state.shared):
            journeys: list[Journey] = []
            for name in names:
                worker, lane = writers.of_shared[name]
                if worker in parts:
                    journeys += self._to_writer(found, name, parts[worker][name], lane, state.shared)
            self._bring(journeys)
        of_teams: list[list[int]] = [[] for _ in range(self._layout.teams)]
        for block, (worker, _) in enumerate(writers.of_block):
            of_teams[self._layout.team_of(worker)].append(block)
        mine = of_teams[self._comm.rank // self._lanes]
        for turn in range(max(map(len, of_teams))):  # all teams come to as many exchanges
            journeys = []
            for block in mine[turn : turn + 1]:
                worker, lane = writers.of_block[block]
                slot = deal.blocks[worker].index(block)
                for name, kinds in state.block.tensors(state.slot_part(vectors[worker], slot)).items():
                    journeys += self._to_writer(found, prefix(block) + name, kinds, lane, state.block, name)
            self._bring(journeys)
        return found

    def to_first(self, part: Tensor | None, here: PartLayout, whole: PartLayout) -> Tensor | None:
        """A whole vector of a part, on the first lane, in host memory. Collective: all ranks.

        Args:
            part: this lane's, laid out by `here`; None: this team has none, as none of its lanes has.
            whole: the layout of what is returned.
        """
        first = part is not None and self._lane == 0
        out = torch.zeros(whole.numel, dtype=part.dtype) if first and part is not None else None
        places = whole.tensors(out) if out is not None else {}
        parts = here.tensors(part) if part is not None else {}
        for names in _batches(here):
            journeys = []
            for name in names if part is not None else ():
                for kind, rows in parts[name].items():
                    if rows.dim():
                        journeys.append(Journey(rows, (0,), places[name][kind] if first else None))
                    elif first:  # a step counter: every lane has it
                        places[name][kind].copy_(rows)
            self._bring(journeys)
        return out

    def _to_writer(
        self,
        found: StateDict,
        name: str,
        parts: Mapping[str, Tensor],
        lane: int,
        layout: PartLayout,
        key: str | None = None,
    ) -> Iterator[Journey]:
        """The journeys of a tensor and its optimizer state; at their end it is in `found`.

        Args:
            key: its name in the layout, if it has another one there.
        """
        (shape,) = (shape for known, shape in layout.shapes if known == (key or name))
        mine = lane == self._lane
        for kind, part in parts.items():
            if part.dim() == 0:  # a step counter: every lane has it
                out = part.cpu().clone()
            else:
                out = torch.empty(shape if mine else (), dtype=part.dtype)
                yield Journey(part, (lane,), out if mine else None)
            if mine:
                found.setdefault(name, {})[kind] = out

    def _bring(self, journeys: Sequence[Journey]) -> None:
        """Send this lane's parts, and join those that come. Collective: all ranks."""
        comm, first = self._comm, self._comm.rank - self._lane
        sends, receives, arriving = [], [], []
        for journey in journeys:
            part = journey.part.to(comm.buffer_device)
            parts = []
            for lane in range(self._lanes):
                if lane in journey.lanes and lane != self._lane:
                    sends.append((part, first + lane))
                if journey.out is not None:
                    parts.append(part if lane == self._lane else torch.empty_like(part))
                    if lane != self._lane:
                        receives.append((parts[-1], first + lane))
            arriving.append(parts)
        comm.exchange(sends, receives, KIND)
        for journey, parts in zip(journeys, arriving, strict=True):
            if journey.out is not None:
                join(parts, journey.out)


def _batches(layout: PartLayout) -> Iterator[list[str]]:
    """A part's tensors in groups that are brought at once, alike on all ranks."""
    names: list[str] = []
    elements = 0
    for name, shape in layout.shapes:
        size = torch.Size(shape).numel()
        if names and elements + size > AT_ONCE:
            yield names
            names, elements = [], 0
        names.append(name)
        elements += size
    if names:
        yield names
