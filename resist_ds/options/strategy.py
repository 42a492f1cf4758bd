"""The ways to train a net that `--strategy` names, as facts: what each worker holds, and when ranks talk."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Strategy:
    """One way to train.

    Attributes:
        says: one line for the user.
        lockstep: gradients are averaged at every step, so there is one worker per rank, all hold the same
            net, and there is nothing to synchronise between rounds.
        spread: the net's training state is spread over the ranks, by FSDP2 or by ZeRO; between rounds each
            rank is given its share of the pool and the shared part, as a worker of `resist` holds them.
        spread_parameters: the parameters too.
        stage: of ZeRO.
    """

    says: str
    lockstep: bool = False
    spread: bool = False
    spread_parameters: bool = False
    stage: int | None = None

    @property
    def partitions(self) -> bool:
        """Whether a worker holds K of the P pool blocks at a time."""
        return self is STRATEGIES["resist"]

    @property
    def averages(self) -> bool:
        """Whether what workers have trained alone is averaged after a round."""
        return self.partitions or self is STRATEGIES["local_sgd"]

    def least_blocks(self, pool: int, min_blocks: int) -> int:
        """Lower bound of the pool blocks that a worker's vector holds."""
        if self.partitions:
            return min_blocks
        return 0 if self.spread else pool

    def test_scale(self, slots: int, pool: int, min_blocks: int) -> float:
        """Scale of the pool's residuals at test time: the share of the blocks that a training step runs."""
        if self.partitions:
            return slots / pool
        return min_blocks / pool if self is STRATEGIES["stochastic_depth"] else 1.0

    def parameters_held(self, parameters: int, sub_parameters: int, ranks: int) -> int:
        """Parameters on a device: of the whole net, of a sub-ResNet, or a share of the net."""
        if self.spread_parameters:
            return -(-parameters // ranks)
        return sub_parameters if self.partitions else parameters


STRATEGIES = {
    "resist": Strategy("each worker holds a part of the pool; averaged and dealt anew after each round"),
    "local_sgd": Strategy("every worker holds the full net; all of it is averaged after each round"),
    "stochastic_depth": Strategy(
        "one worker, the full net, of whose pool min_blocks random blocks run a step"
    ),
    "ddp": Strategy("every worker holds the full net; gradients are averaged at every step", lockstep=True),
    "fsdp": Strategy(
        "FSDP2: parameters, gradients and optimizer state are spread over the ranks",
        lockstep=True,
        spread=True,
        spread_parameters=True,
    ),
    "zero1": Strategy("ZeRO 1: optimizer state is spread over the ranks", True, True, stage=1),
    "zero2": Strategy("ZeRO 2: optimizer state and gradients are spread over the ranks", True, True, stage=2),
    "zero3": Strategy(
        "ZeRO 3: parameters, gradients and optimizer state are spread over the ranks", True, True, True, 3
    ),
}
