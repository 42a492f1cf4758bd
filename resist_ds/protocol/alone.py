"""What each worker holds alone between rounds, as a checkpoint has it: whole vectors, whatever its team is.

That is the rounding error of what it sends (the compact wire), and its shared part where it has gone on being
trained behind an exchange. Of these a lane has its slice, its rows, or, as all of its team, everything.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from resist_ds.comm import Comm
from resist_ds.nets.shards import place
from resist_ds.nets.subnet import OptimizerState, PartLayout, StateLayout
from resist_ds.protocol.partition import Layout
from resist_ds.protocol.team_gather import KIND
from resist_ds.protocol.team_shards import TeamShards

Kind = Literal["error", "shared"]


class Alone:
    """Makes what this rank holds of it whole, on the first rank of its team; and takes it up again.

    Args:
        state: of this rank's vectors.
        carried: what of the optimizer's state outlives a round.
        lanes: [start, stop) of the errors that each lane has, where a team holds the same vectors.
    """

    def __init__(
        self,
        comm: Comm,
        layout: Layout,
        state: StateLayout,
        carried: OptimizerState,
        shards: TeamShards | None,
        lanes: Sequence[tuple[int, int]],
    ):
        self._comm = comm
        self._state = state
        self._carried = carried
        self._shards = shards
        self._lanes = lanes
        self._lane = layout.lane_of(comm.rank)
        self._size = layout.team_size
        self._turns = layout.most_workers

    def whole(self, kind: Kind, values: Mapping[int, Tensor]) -> dict[int, Tensor]:
        """{worker: what it holds}, on the first rank of its team. Collective: all ranks.

        Args:
            values: {worker: what this rank has of it}.
        """
        if self._size == 1:
            return dict(values)
        found = {}
        workers = sorted(values)
        for turn in range(self._turns):  # all teams come to as many exchanges
            worker = workers[turn] if turn < len(workers) else None
            out = self._whole(kind, None if worker is None else values[worker])
            if out is not None and worker is not None:
                found[worker] = out
        return found

    def take(self, kind: Kind, here: Tensor, whole: Tensor) -> None:
        """Put what this rank has of a worker's `whole` into its place."""
        if self._shards is None:
            lo, hi = self._lanes[self._lane] if kind == "error" else (0, len(whole))
            here.copy_(whole[lo:hi])
            return
        part, of_whole = self._layouts(kind)
        padded = [torch.zeros(layout.numel, dtype=here.dtype) for layout in (part, of_whole)]
        padded[1][: len(whole)].copy_(whole)
        views = of_whole.tensors(padded[1])
        for name, tensors in part.tensors(padded[0]).items():
            for row, rows in tensors.items():
                place(views[name][row], rows, self._lane, self._size)
        here.copy_(padded[0][: len(here)])

    def _whole(self, kind: Kind, part: Tensor | None) -> Tensor | None:
        """One worker's, or nothing where this team has none left. Collective: all ranks."""
        if self._shards is None:
            if kind == "shared":
                return part if self._lane == 0 else None
            return self._slices(part)
        layouts = self._layouts(kind)
        padded = None
        if part is not None:
            padded = torch.zeros(layouts[0].numel, dtype=part.dtype)
            padded[: len(part)].copy_(part)
        out = self._shards.to_first(padded, *layouts)
        if out is None or kind == "shared":
            return out
        return out[: layouts[1].matrices].clone()

    def _layouts(self, kind: Kind) -> tuple[PartLayout, PartLayout]:
        """Of what a lane has of shared, and of all of it."""
        state = self._carried if kind == "shared" else OptimizerState(())
        here, whole = self._state.shared, self._state.whole().shared
        return replace(here, state=state), replace(whole, state=state)

    def _slices(self, part: Tensor | None) -> Tensor | None:
        """Put all lanes' slices together on the first one. Collective: all ranks."""
        comm, first = self._comm, self._comm.rank - self._lane
        if part is None:
            comm.exchange([], [], KIND)
            return None
        part = part.to(comm.buffer_device)
        if self._lane:
            comm.exchange([(part, first)] if len(part) else [], [], KIND)
            return None
        out = torch.empty(self._lanes[-1][1], dtype=part.dtype, device=part.device)
        slices = [out[lo:hi] for lo, hi in self._lanes]
        slices[0].copy_(part)
        comm.exchange([], [(s, first + i) for i, s in enumerate(slices) if i and len(s)], KIND)
        return out.cpu()
