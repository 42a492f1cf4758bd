"""Who writes what of the global model into a checkpoint. Pure."""

import math

from resist_ds.nets.subnet import StateLayout
from resist_ds.protocol.partition import Partition, spread


class Writers:
    """Which worker, and which lane of its team, writes each tensor of the global model into a checkpoint.

    A pool block belongs to its owner, and the shared tensors, which all workers hold, are spread so that all
    own about as much; a team's ranks share what its workers own.

    Args:
        lanes: G.
    """

    def __init__(self, layout: StateLayout, deal: Partition, lanes: int = 1):
        places = [(worker, lane) for worker in range(deal.workers) for lane in range(lanes)]
        loads = dict.fromkeys(places, 0)
        self.of_block: list[tuple[int, int]] = []
        owned = [0] * deal.workers
        for owner in deal.owners:
            self.of_block.append((owner, owned[owner] % lanes))
            owned[owner] += 1
            loads[self.of_block[-1]] += layout.block.parameters
        sizes = {name: math.prod(shape) for name, shape in layout.shared.shapes}
        given = spread(sizes, list(loads.values()))
        self.of_shared = {name: places[place] for name, place in given.items()}
