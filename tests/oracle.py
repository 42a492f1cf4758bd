"""The oracle: ResIST as a plain single-process simulation, to hold real runs against.

It shares no code with the package's sub-ResNet, local step, synchronisation and evaluation. A worker's
sub-ResNet is the full timm net with `nn.Identity` in place of the pool blocks that it does not hold; the
global model is a dict of tensors by timm's names; `oracle_wire` has what workers agree on. From the package
come only what a run is *given*: deals (whose properties are checked here), initial values, batches.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import timm
import torch
import torch.nn.functional as F
from timm.layers import create_conv2d
from timm.models import register_model
from timm.models.resnet import BasicBlock, Bottleneck, ResNet
from torch import Tensor, nn

from resist_ds.data.datasets import Data, load_data
from resist_ds.data.order import Order
from resist_ds.nets.blueprint import CIFAR_NETS, Blueprint
from resist_ds.nets.subnet import StateDict
from resist_ds.options.config import Config
from resist_ds.protocol.partition import Partition, sample_partition
from resist_ds.trainer import Trainer
from tests.oracle_wire import Compact, Exact, State

CPU = torch.device("cpu")

# Small nets with odd pools: P = 7 basic blocks, P = 5 bottlenecks, P = 5 wide blocks.


@register_model
def resist_test_basic(pretrained: bool = False, num_classes: int = 10, device: object = None, **_: object):
    """A post-activation ResNet of 13 k parameters; the last norm of every branch starts at zero."""
    widths = {"channels": (8, 8, 16, 16), "stem_width": 4, "stem_type": "deep"}
    return ResNet(BasicBlock, (1, 1, 8, 1), num_classes=num_classes, device=device, **widths)


@register_model
def resist_test_bottleneck(
    pretrained: bool = False, num_classes: int = 10, device: object = None, **_: object
):
    """A post-activation ResNet-D of bottleneck blocks, 33 k parameters."""
    widths = {"channels": (4, 4, 8, 8), "stem_width": 4, "stem_type": "deep", "avg_down": True}
    return ResNet(Bottleneck, (1, 2, 6, 1), num_classes=num_classes, device=device, **widths)


@register_model
def resist_test_wide(pretrained: bool = False, num_classes: int = 10, device: object = None, **_: object):
    """A pre-activation net whose five pool blocks take 1.2 MB each, with momentum in float64."""
    shape = {"layers": (1, 1, 6, 1), "channels": (8, 8, 64, 8), "stem_chs": 8}
    return timm.create_model("resnetv2_34", num_classes=num_classes, device=device, **shape)


@register_model
def resist_test_pre_bottleneck(
    pretrained: bool = False, num_classes: int = 10, device: object = None, **_: object
):
    """A pre-activation net of bottleneck blocks with BatchNorm, as resnetv2_50, but narrow; P = 5."""
    shape = {"layers": (1, 1, 6, 1), "channels": (16, 16, 32, 32), "stem_chs": 8}
    return timm.create_model("resnetv2_50", num_classes=num_classes, device=device, **shape)


# ------------------------------------------------------------------------------------------------------------
# Plain nets

SECTION = {"stages": "stages.2.blocks", "layer3": "layer3"}  # by a name that the family's nets have
BRANCH_END = {"PreActBasic": "conv2", "PreActBottleneck": "conv3", "BasicBlock": "bn2", "Bottleneck": "bn3"}


def plain_net(config: Config, classes: int) -> nn.Module:
    """The whole net, as somebody who has never heard of this package would make it."""
    if config.model not in CIFAR_NETS:
        return timm.create_model(config.model, num_classes=classes)
    layers, channels = CIFAR_NETS[config.model]
    net = timm.create_model(
        "resnetv2_34", layers=layers, channels=channels, stem_chs=channels[0], num_classes=classes
    )
    net.stem = nn.Sequential()
    net.stem.add_module("conv", create_conv2d(3, channels[0], 3))
    return net


def section3(net: nn.Module) -> tuple[str, nn.Sequential]:
    """Section 3 and timm's name of it."""
    name = next(path for child, path in SECTION.items() if hasattr(net, child))
    section = net.get_submodule(name)
    assert isinstance(section, nn.Sequential)
    return name, section


# ------------------------------------------------------------------------------------------------------------
# The protocol


@dataclass
class Outcome:
    """What a run comes to.

    Attributes:
        state: the global model after the last round. With momentum where it travels.
        deals: of every round, and the one that the last round hands on to.
        train: (loss, accuracy) of every round's local steps.
        tests: (loss, accuracy) of the global model, by the number of rounds done.
    """

    state: State
    deals: list[Partition] = field(default_factory=list)
    train: list[tuple[float, float]] = field(default_factory=list)
    tests: dict[int, tuple[float, float]] = field(default_factory=dict)


def simulate(config: Config) -> Outcome:
    """Run the whole protocol in this process: `config.workers` workers for `config.rounds` rounds."""
    assert config.workers and config.rounds
    threads = torch.get_num_threads()
    torch.set_num_threads(config.cpu_threads or 1)
    try:
        return _Simulation(config).run()
    finally:
        torch.set_num_threads(threads)


class _Simulation:
    def __init__(self, config: Config):
        self.config = config
        self.dtype = getattr(torch, config.dtype)
        self.data: Data = load_data(config)
        self.workers, self.rounds = config.workers or 0, config.rounds or 0
        self.order = Order(config.seed, self.data.train_size, self.workers, config.batch_size)
        self.section, blocks = section3(self.net())
        self.pool = len(blocks) - 1  # all but the first, strided one
        self.outcome = Outcome(self._initial())
        self.own: list[State] = [{}] * self.workers  # of shared, where it is not what all agreed on
        travel = config.optimizer_state == "travel"
        self.wire = Exact(travel)
        if config.wire == "compact":
            pool = [self.prefix(block) for block in range(self.pool)]
            self.wire = Compact(travel, self.workers, self.outcome.state, pool)

    def net(self) -> nn.Module:
        return plain_net(self.config, self.data.num_classes).to(self.dtype)

    def prefix(self, block: int) -> str:
        return f"{self.section}.{block + 1}."

    def in_pool(self, name: str) -> bool:
        return name.startswith(f"{self.section}.") and not name.startswith(f"{self.section}.0.")

    def run(self) -> Outcome:
        config, outcome = self.config, self.outcome
        outcome.deals = [self.deal(r) for r in range(self.rounds + 1)]
        for done, deal in enumerate(outcome.deals[:-1], start=1):
            self._round(done - 1, deal, self._overlap(done))
            if done == self.rounds or (config.eval_every and done % config.eval_every == 0):
                scale = 1.0 if done <= config.warmup_rounds else len(deal.blocks[0]) / self.pool
                outcome.tests[done] = self._test(scale)
        return outcome

    def deal(self, round: int) -> Partition:
        """A round's deal, checked: coverage, equal work, no block twice, holder counts, owners."""
        config, pool, workers = self.config, self.pool, self.workers
        least = pool if round < config.warmup_rounds else config.min_blocks
        deal = sample_partition(config.seed, round, workers=workers, pool=pool, min_blocks=least)
        slots = max(least, math.ceil(pool / workers))
        assert len(deal.blocks) == workers and len(deal.owners) == pool
        for blocks in deal.blocks:
            assert list(blocks) == sorted(set(blocks)) and len(blocks) == slots
            assert set(blocks) <= set(range(pool))
        counts = [sum(block in blocks for blocks in deal.blocks) for block in range(pool)]
        assert min(counts) >= 1 and max(counts) - min(counts) <= 1
        assert all(block in deal.blocks[owner] for block, owner in enumerate(deal.owners))
        loads = [deal.owners.count(worker) for worker in range(workers)]
        assert max(loads) - min(loads) <= 1
        return deal

    def _overlap(self, done: int) -> int:
        """τ of the round after which `done` are done: 0 where something is to be made of the global model."""
        config, deals = self.config, self.outcome.deals
        images = config.local_steps * self.workers * config.batch_size
        a_pass_ends = done * images // self.data.train_size > (done - 1) * images // self.data.train_size
        every = config.checkpoint_every
        plain = (
            done == self.rounds
            or (config.eval_every > 0 and done % config.eval_every == 0)
            or (a_pass_ends if every is None else every > 0 and done % every == 0)
            or len(deals[done - 1].blocks[0]) != len(deals[done].blocks[0])
        )
        return 0 if plain else config.overlap_steps

    def _initial(self) -> State:
        blueprint = Blueprint(self.config.model, self.data.num_classes)
        values = dict(blueprint.initial_shared(self.config.seed))
        for block in range(self.pool):
            for name, value in blueprint.initial_block(self.config.seed, block).items():
                values[self.prefix(block) + name] = value
        names = [name for name, _ in self.net().named_parameters()]
        assert values.keys() == set(names)
        return {name: {"parameter": values[name].to(self.dtype)} for name in names}

    def _round(self, round: int, deal: Partition, overlap: int) -> None:
        """Local steps of every worker; of shared they agree on what it was `overlap` steps before the end."""
        sent, ends, losses, right = [], [], [], 0
        for worker in range(self.workers):
            then, end, batch_losses, batch_right = self._worker(round, worker, deal.blocks[worker], overlap)
            sent.append(then)
            ends.append(end)
            losses += batch_losses
            right += batch_right
        self.outcome.state = agreed = self.wire.agree(sent, deal)
        if overlap:  # each is where it has gone on to, and where the others take it
            self.own = [
                {
                    name: {kind: now[name][kind] + (n - then[name][kind]) for kind, n in agreed[name].items()}
                    for name in now
                    if not self.in_pool(name)
                }
                for now, then in zip(ends, sent, strict=True)
            ]
            for kept in (kept for own in self.own for kept in own.values() if "exp_avg_sq" in kept):
                kept["exp_avg_sq"].clamp_(min=0)
        else:
            self.own = [{}] * self.workers
        images = len(losses) * self.config.batch_size
        self.outcome.train.append((math.fsum(losses) / len(losses), right / images))

    def _worker(
        self, round: int, worker: int, held: tuple[int, ...], overlap: int
    ) -> tuple[State, State, list[float], int]:
        """What takes part of a worker (shared as it was before), its end, losses, right answers."""
        config, steps = self.config, self.config.local_steps
        net = self.net().train()
        _, section = section3(net)
        for block in set(range(self.pool)) - set(held):
            section[block + 1] = nn.Identity()
        parameters = dict(net.named_parameters())
        optimizer = self._optimizer(parameters, self.outcome.state | self.own[worker])
        sent, losses, right = None, [], 0
        for step in range(round * steps, (round + 1) * steps):
            if step == (round + 1) * steps - overlap:
                sent = _snapshot(parameters, optimizer)
            for group in optimizer.param_groups:
                group["lr"] = self._rate(step)
            batch = [self.order.batch(step, worker)]
            ((x, y),) = self.data.train_batches(batch, CPU, self.dtype, config.channels_last)
            optimizer.zero_grad()
            parts, loss_of_batch = config.accumulation_steps, 0.0
            for x_part, y_part in zip(x.chunk(parts), y.chunk(parts), strict=True):
                logits = net(x_part)
                loss = F.cross_entropy(logits, y_part, label_smoothing=config.label_smoothing) / parts
                loss.backward()
                loss_of_batch += loss.item()
                right += int((logits.argmax(1) == y_part).sum())
            if config.clip_grad:
                norm = math.sqrt(sum(float(p.grad.double().square().sum()) for p in parameters.values()))
                for p in parameters.values():
                    p.grad.mul_(min(1.0, config.clip_grad / (norm + 1e-6)))
            optimizer.step()
            losses.append(loss_of_batch)
        end = _snapshot(parameters, optimizer)
        then = end if sent is None else sent | {name: end[name] for name in filter(self.in_pool, end)}
        return then, end, losses, right

    def _optimizer(self, parameters: dict[str, nn.Parameter], start: State) -> torch.optim.Optimizer:
        """torch's own optimizer of the parameters, at a round's first values and momentum."""
        config = self.config
        if config.optimizer == "adamw":
            optimizer: torch.optim.Optimizer = torch.optim.AdamW(
                parameters.values(),
                config.lr,
                betas=tuple(float(beta) for beta in config.betas.split(",")),
                eps=config.eps,
                weight_decay=config.weight_decay,
                fused=self.dtype == torch.float32,  # the same kernel for the same bits, where those matter
            )
        else:
            optimizer = torch.optim.SGD(
                parameters.values(),
                config.lr,
                momentum=config.momentum,
                nesterov=config.nesterov,
                weight_decay=config.weight_decay,
            )
        for name, parameter in parameters.items():
            _set(optimizer, parameter, start[name])
        return optimizer

    def _rate(self, step: int) -> float:
        """Learning rate of a local step, of `steps` in the run."""
        config, steps = self.config, self.rounds * self.config.local_steps
        rate = config.lr
        if config.schedule == "step":
            rate /= 100 if 4 * step >= 3 * steps else 10 if 2 * step >= steps else 1
        elif config.schedule == "cosine":
            rate *= math.cos(math.pi / 2 * step / steps) ** 2
        if step + 1 < config.lr_warmup_steps:
            rate *= (step + 1) / config.lr_warmup_steps
        return rate

    def _test(self, scale: float) -> tuple[float, float]:
        """(loss, accuracy) of the global model, with the residual of each pool block times `scale`."""
        net = self.net().eval()
        with torch.no_grad():
            for name, parameter in net.named_parameters():
                parameter.copy_(self.outcome.state[name]["parameter"])
        _, section = section3(net)
        for block in section[1:]:
            end = block.get_submodule(BRANCH_END[type(block).__name__])
            end.register_forward_hook(lambda _module, _inputs, branch: branch * scale)
        with torch.no_grad():
            self._calibrate(net)
            loss, right = 0.0, 0
            for x, y in self._test_batches():
                logits = net(x)
                loss += F.cross_entropy(logits.double(), y, reduction="sum").item()
                right += int((logits.argmax(1) == y).sum())
        return loss / self.data.test_size, right / self.data.test_size

    def _calibrate(self, net: nn.Module) -> None:
        """Set each BatchNorm's statistics, in order, from what reaches it when those before are set."""
        size, count = self.data.train_size, self.config.calibration_samples
        indices = np.linspace(0, size - 1, min(count, size)).round().astype(np.int64)
        images = self.data.train_images(indices, CPU, self.dtype, self.config.channels_last)

        def estimate(norm: nn.BatchNorm2d, inputs: tuple[Tensor]) -> None:
            x = inputs[0].double().transpose(0, 1).flatten(1)  # [channels, values]
            mean = x.sum(1) / x.shape[1]
            norm.running_mean.copy_(mean)
            norm.running_var.copy_((x * x).sum(1) / x.shape[1] - mean * mean)

        norms = [m for m in net.modules() if isinstance(m, nn.BatchNorm2d)]
        handles = [norm.register_forward_pre_hook(estimate) for norm in norms]
        net(images)
        for handle in handles:
            handle.remove()

    def _test_batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        batches = np.array_split(np.arange(self.data.test_size), 4)
        return self.data.test_batches(batches, CPU, self.dtype, self.config.channels_last)


def _snapshot(parameters: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> State:
    return {
        name: {kind: t.detach().clone() for kind, t in {"parameter": p, **optimizer.state[p]}.items()}
        for name, p in parameters.items()
    }


def _set(optimizer: torch.optim.Optimizer, parameter: nn.Parameter, values: dict[str, Tensor]) -> None:
    """Give a parameter its value, and the optimizer what it keeps of it."""
    state = {kind: tensor.clone() for kind, tensor in values.items()}
    parameter.data.copy_(state.pop("parameter"))
    if state:
        optimizer.state[parameter] = state


# ------------------------------------------------------------------------------------------------------------
# Real runs


def arrays(state: StateDict) -> dict[str, dict[str, np.ndarray]]:
    """A copy of a state dict that can travel between processes."""
    return {
        name: {kind: t.detach().cpu().numpy().copy() for kind, t in of.items()} for name, of in state.items()
    }


def held(trainer: Trainer) -> dict[int, dict[str, dict[str, np.ndarray]]]:
    """{worker: {timm name: {"parameter": ..., ...}}}: all that lies in the vectors of a rank's workers."""
    layout, everything = trainer.workers.layout, {}
    for worker, vector in trainer.workers.vectors.items():
        parts = [("", layout.shared, layout.shared_part(vector))]
        for slot, block in enumerate(trainer.net.deal.blocks[worker]):
            part = layout.slot_part(vector, slot)
            parts.append((trainer.net.blueprint.block_prefix(block), layout.block, part))
        state: StateDict = {}
        for prefix, layout_of_part, part in parts:
            kept = layout_of_part.optimizer_views(part)
            for name, view in layout_of_part.views(part).items():
                state[prefix + name] = {"parameter": view, **kept[name]}
        everything[worker] = arrays(state)
    return everything
