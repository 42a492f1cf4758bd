"""Where a run begins: the workers of every rank, made and filled."""

from resist_ds.comm import Comm
from resist_ds.engines.spread import SpreadNet
from resist_ds.engines.workers import Workers
from resist_ds.memory import one_line_when_out
from resist_ds.nets.blueprint import Blueprint
from resist_ds.options.config import Config
from resist_ds.protocol.global_model import deal_of
from resist_ds.protocol.partition import Layout
from resist_ds.state.start import Start


def place_workers(
    comm: Comm, config: Config, layout: Layout, blueprint: Blueprint, start: Start
) -> Workers | SpreadNet:
    """The workers that this rank plays, in the state that the run begins with. Collective: all ranks.

    Args:
        start: what the run begins from.

    Raises:
        UserError: the options ask for more than the model has.
    """
    deal = deal_of(config, blueprint, layout.workers, start.position.round)
    if config.deepspeed_config is not None and config.way.partitions:
        comm.alone  # noqa: B018  # made by all ranks together, before each makes its engine

    def placed() -> Workers | SpreadNet:
        source = start.source(blueprint, config.test_scale(deal.slots, deal.pool))
        with one_line_when_out(comm.device, comm.rank):
            place = (comm, layout, blueprint, config, deal, source, start.position.step)
            if config.way.spread:
                return SpreadNet(*place)
            workers = Workers(*place)
        if start.state and start.state.loss_scales:
            workers.set_loss_scales(start.state.loss_scales)
        return workers

    start.fetch(comm)
    workers = comm.agree(placed)
    with one_line_when_out(comm.device, comm.rank):
        workers.connect()
    return workers
