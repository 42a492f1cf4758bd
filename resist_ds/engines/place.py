"""Where a run begins: the workers of every rank, made and filled."""

from resist_ds.comm import Comm
from resist_ds.engines.sharded import ShardedWorkers
from resist_ds.engines.spread import SpreadNet
from resist_ds.engines.workers import Workers
from resist_ds.errors import UserError
from resist_ds.memory import one_line_when_out
from resist_ds.nets.blueprint import Blueprint
from resist_ds.options.config import Config
from resist_ds.protocol.global_model import deal_of
from resist_ds.protocol.partition import Layout
from resist_ds.state.start import Start


def layout_of(comm: Comm, config: Config, start: Start) -> Layout:
    """Who plays whom. Collective: all ranks.

    Args:
        start: what the run begins from; it is told what the user should know.

    Raises:
        UserError: there are no such teams, or fewer workers than teams.
    """
    team_size = _team_size(comm, config, start)
    return Layout(start.workers(comm.size, team_size), comm.size, team_size)


def _team_size(comm: Comm, config: Config, start: Start) -> int:
    """G. Collective: all ranks.

    Raises:
        UserError: the ranks, or a worker's batch, cannot be divided so.
    """
    size, parts = config.team_size, config.accumulation_steps
    if size == "auto":
        on_machines = comm.gather(comm.local_size)
        size = on_machines[0]
        if set(on_machines) != {size}:
            raise UserError(
                f"--team_size auto needs as many ranks on every machine, and there are from "
                f"{min(on_machines)} to {max(on_machines)}: type a number"
            )
    assert isinstance(size, int)
    if size > comm.size:
        there = "is 1 rank" if comm.size == 1 else f"are {comm.size} ranks"
        raise UserError(
            f"--team_size is {size}, and there {there}: start {size} or more, or leave --team_size out"
        )
    if comm.size % size:
        raise UserError(
            f"--team_size is {size}, and {comm.size} ranks cannot be cut into teams of {size}: type a "
            f"divisor of {comm.size}"
        )
    if config.batch_size % (size * parts):
        cut = f"{size} ranks" + (f" and --accumulation_steps {parts}" if parts > 1 else "")
        raise UserError(
            f"--batch_size {config.batch_size} cannot be divided over a team's {cut}: type a multiple of "
            f"{size * parts}"
        )
    if size == 1 and config.team_size == "auto" and config.team_strategy != "ddp":
        raise UserError(
            f"--team_size auto makes a team of every machine's one rank, and --team_strategy "
            f"{config.team_strategy} is for teams of several: leave both out"
        )
    machines = comm.gather(comm.machine)
    teams = [machines[first : first + size] for first in range(0, comm.size, size)]
    for number, team in enumerate(teams):
        if len(set(team)) > 1:
            names = " and ".join(dict.fromkeys(machine.partition(" ")[0] for machine in team))
            start.remarks.append(
                f"team {number} spans machines ({names}): each of its steps crosses the network between "
                "them; start as many ranks on each machine, a multiple of --team_size"
            )
            break
    return size


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
    if layout.team_size > 1 or config.deepspeed_config is not None:
        for size in (1, layout.team_size):  # made by all ranks together, before any makes its engine
            comm.team(size, apart=config.overlap_steps > 0).group  # noqa: B018

    def placed() -> Workers | SpreadNet:
        source = start.source(blueprint, config.test_scale(deal.slots, deal.pool))
        with one_line_when_out(comm.device, comm.rank):
            place = (comm, layout, blueprint, config, deal, source, start.position.step)
            if config.way.spread:
                return SpreadNet(*place)
            if config.inside and config.inside.spread:
                return ShardedWorkers(*place)
            return Workers(*place)

    start.fetch(comm)
    workers = comm.agree(placed)
    with one_line_when_out(comm.device, comm.rank):
        workers.connect()
    if isinstance(workers, Workers) and start.state and start.state.loss_scales:
        workers.set_loss_scales(start.state.loss_scales)
    return workers
