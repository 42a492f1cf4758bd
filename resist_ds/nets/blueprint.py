"""The global model as a blueprint: its names, shapes and initial values, never its weights as a whole.

A ResNet is stem, four sections, head. Section 3 without its first, strided block is the *pool* whose
blocks are partitioned; everything else is *shared* (paper, section 3.1). All that differs between the
families of nets stands in `FAMILIES`; everything after that table treats them alike.

The blueprint is built on the meta device, so it costs no memory whatever the depth, and the initial
values are timm's own: its constructor is run once per piece with everything but that piece on meta.
"""

import copy
import difflib
import hashlib
import math
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from inspect import isfunction
from typing import Any

import timm
import timm.models.resnet as resnet  # not "from timm.models", which would import all its nets
import timm.models.resnetv2 as resnetv2
import torch
from timm.layers import BatchNormAct2d, create_conv2d
from torch import Tensor, nn
from torch.nn.modules import module as nn_module
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode

from resist_ds.errors import UserError

Shapes = tuple[tuple[str, tuple[int, ...]], ...]  # (name, shape) of every parameter, in module order
Statistics = dict[str, tuple[Tensor, Tensor]]  # {timm name of a BatchNorm: (mean [C], variance [C])}


@dataclass(frozen=True)
class Family:
    """What one family of nets calls its parts.

    `before` and `after` are the modules that run, in order, before and after the pool;
    `section` is the `nn.Sequential` of section 3; `branch_end` names, per block class, the
    submodule that ends the residual branch: what it holds is linear in its parameters, so a residual
    scale can be folded into them.
    """

    net: type[nn.Module]
    section: str
    before: tuple[str, ...]
    after: tuple[str, ...]
    branch_end: dict[type[nn.Module], str]


FAMILIES = (
    Family(
        net=resnetv2.ResNetV2,
        section="stages.2.blocks",
        before=("stem", "stages.0.blocks", "stages.1.blocks", "stages.2.blocks.0"),
        after=("stages.3.blocks", "norm", "head"),
        branch_end={resnetv2.PreActBasic: "conv2", resnetv2.PreActBottleneck: "conv3"},
    ),
    Family(
        net=resnet.ResNet,
        section="layer3",
        before=("conv1", "bn1", "act1", "maxpool", "layer1", "layer2", "layer3.0"),
        after=("layer4", "global_pool", "fc"),
        branch_end={resnet.BasicBlock: "bn2", resnet.Bottleneck: "bn3"},
    ),
)

# timm's own functions, which `timm.create_model` calls; that one imports all its nets to know their names.
_ENTRIES: dict[str, Callable[..., nn.Module]] = {
    name: entry
    for module in (resnet, resnetv2)
    for name in module.__all__
    if isfunction(entry := getattr(module, name))
}

TESTED = (
    *(f"resnetv2_{depth}" for depth in (18, 34, 50, 101, 152)),
    *(f"resnet{depth}" for depth in (50, 101, 152)),
)

# The paper's CIFAR nets (release: PreAct basic blocks, 3x3 stride-1 stem, no max-pool) and the demo's.
CIFAR_NETS: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "preact_resnet101": ((3, 4, 23, 3), (64, 128, 256, 512)),
    "preact_resnet152": ((3, 4, 36, 3), (64, 128, 256, 512)),
    "preact_resnet200": ((3, 4, 50, 3), (64, 128, 256, 512)),
    "preact_resnet_small": ((1, 1, 9, 1), (8, 16, 32, 64)),
    "preact_resnet101_narrow": ((3, 4, 23, 3), (8, 16, 32, 64)),
}


def _cifar_net(name: str, num_classes: int) -> nn.Module:
    layers, channels = CIFAR_NETS[name]
    # bottle_ratio: timm's default of 0.25 would narrow the blocks (10.5 M parameters, not 41.4 M)
    net = resnetv2.ResNetV2(
        layers=list(layers),
        channels=channels,
        num_classes=num_classes,
        stem_chs=channels[0],
        basic=True,
        bottle_ratio=1.0,
        conv_layer=create_conv2d,
        norm_layer=BatchNormAct2d,
        device="meta",
    )
    net.stem = nn.Sequential(OrderedDict(conv=create_conv2d(3, channels[0], 3, stride=1, device="meta")))
    net.init_weights(zero_init_last=False)  # once more, so that the new stem has timm's values too
    return net


def _timm_net(name: str, num_classes: int) -> nn.Module:
    try:
        create = _ENTRIES.get(name) or partial(timm.create_model, name)
        return create(num_classes=num_classes, device="meta")
    except RuntimeError as error:  # a pretrained tag that does not exist, say
        raise UserError(f"--model {name}: {str(error).splitlines()[0]} {_families()}") from None


def _construct(name: str, num_classes: int) -> nn.Module:
    with _NothingToDraw():
        return (_cifar_net if name in CIFAR_NETS else _timm_net)(name, num_classes)


class _NothingToDraw(TorchFunctionMode):
    """Meta tensors have no values to draw. Torch runs `normal_` on them in Python, by way of its compiler."""

    def __torch_function__(
        self, func: Callable[..., Any], types: object, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func.__name__.endswith("normal_"):  # Tensor.normal_, and those of torch.nn.init around it
            tensor = args[0] if args else kwargs["tensor"]
            if tensor.is_meta:
                return tensor
        return func(*args, **kwargs)


@contextmanager
def _registrations(hook: Callable[[Tensor], Tensor | None]) -> Iterator[None]:
    """Show every parameter and buffer that a module registers to `hook`, which may replace it."""

    def replaced(_module: nn.Module, _name: str, tensor: Tensor | None) -> Tensor | None:
        return tensor if tensor is None else hook(tensor)

    handles = (
        nn_module.register_module_parameter_registration_hook(replaced),  # type: ignore[arg-type]
        nn_module.register_module_buffer_registration_hook(replaced),  # type: ignore[arg-type]
    )
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class Blueprint:
    """Names, shapes and initial values of a global model.

    Attributes:
        pool: P, the number of partitioned blocks.
        shared: (timm name, shape) of every shared parameter.
        block: (name inside the block, shape) of a pool block's parameters; the same for all P.
        head: names of the classifier's parameters.
        norms: (timm name, channels) of every BatchNorm of the global model.
        branch_end: the submodule of a pool block that ends its residual branch.

    Raises:
        UserError: the name is unknown, the net is of no known family, its section 3 is no run of
            identical blocks, or a residual scale cannot be folded into its blocks.
    """

    def __init__(self, name: str, num_classes: int):
        self.name = name
        self.num_classes = num_classes
        if name not in CIFAR_NETS and name not in _ENTRIES and not timm.is_model(name):
            near = difflib.get_close_matches(
                name, sorted({*CIFAR_NETS, *TESTED, *timm.list_models("resnet*")}), 3
            )
            hint = f" (nearest: {', '.join(near)})" if near else f". {_families()}"
            raise UserError(f"unknown --model {name}{hint}")

        # The constructor registers its tensors in the same order every time: the place in that order
        # is what tells a tensor's name while the model is still being built.
        order: list[Tensor] = []
        with _registrations(order.append):
            net = _construct(name, num_classes)
        names = {id(tensor): n for n, tensor in (*net.named_parameters(), *net.named_buffers())}
        self._registered = tuple(names.get(id(tensor)) for tensor in order)

        self.family = self._family(net)
        blocks = net.get_submodule(self.family.section)
        assert isinstance(blocks, nn.Sequential)
        if len(blocks) < 2 or len({_structure(block) for block in blocks[1:]}) != 1:
            raise UserError(f"--model {name}: section 3 is no run of identical blocks. {_families()}")
        self._net = net
        self.pool = len(blocks) - 1
        self._pool_prefixes = tuple(f"{self.family.section}.{b + 1}." for b in range(self.pool))
        self.shared: Shapes = tuple(
            (n, tuple(p.shape)) for n, p in net.named_parameters() if not n.startswith(self._pool_prefixes)
        )
        self.block: Shapes = tuple((n, tuple(p.shape)) for n, p in blocks[1].named_parameters())
        self.branch_end = self.family.branch_end[type(blocks[1])]
        classifier = net.get_classifier()  # type: ignore[operator]
        heads = {id(parameter) for parameter in classifier.parameters()}
        self.head = tuple(n for n, parameter in net.named_parameters() if id(parameter) in heads)
        self.norms = tuple((n, m.num_features) for n, m in net.named_modules() if isinstance(m, _BatchNorm))
        stateful = [
            n for n, m in net.named_modules() if [*m.buffers(recurse=False)] and not isinstance(m, _BatchNorm)
        ]
        if stateful:  # evaluation re-estimates BatchNorm's statistics; any other state would be lost
            raise UserError(
                f"--model {name}: {stateful[0]} keeps state that is not BatchNorm's. {_families()}"
            )
        self._check_foldable()

    def _family(self, net: nn.Module) -> Family:
        for family in FAMILIES:
            if (
                isinstance(net, family.net)
                and type(net.get_submodule(f"{family.section}.0")) in family.branch_end
            ):
                return family
        raise UserError(f"--model {self.name} is of no family that ResIST can partition. {_families()}")

    @property
    def parameters(self) -> int:
        """Number of parameters of the whole global model."""
        return sum(p.numel() for p in self._net.parameters())

    def parameters_held(self, slots: int) -> int:
        """Number of parameters of a sub-ResNet with `slots` pool blocks."""
        return sum(math.prod(s) for _, s in self.shared) + slots * sum(math.prod(s) for _, s in self.block)

    def block_prefix(self, block: int) -> str:
        """timm's prefix of pool block `block` (0 … P−1), for instance `stages.2.blocks.1.`."""
        return self._pool_prefixes[block]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """{timm name: shape} of every parameter of the global model, in its order."""
        return {name: tuple(p.shape) for name, p in self._net.named_parameters()}

    def subnet(self, slots: int) -> nn.Module:
        """A meta-device sub-ResNet with `slots` places for pool blocks; parameters named as in timm."""
        net = copy.deepcopy(self._net)
        parent, _, name = self.family.section.rpartition(".")
        section = net.get_submodule(self.family.section)
        assert isinstance(section, nn.Sequential)
        setattr(net.get_submodule(parent), name, section[: 1 + slots])
        return net

    def pool_block(self) -> nn.Module:
        """One pool block on the meta device."""
        return copy.deepcopy(self._net.get_submodule(self.block_prefix(0).rstrip(".")))

    def fold(self, tensors: dict[str, Tensor], scale: float) -> None:
        """Multiply a pool block's residual branch by `scale`, in place, in its last layer's tensors.

        `tensors` are keyed by the name inside the block. Paper, section 3.2: at test time each
        partitioned block's residual is scaled by the share of blocks that was active in training.
        """
        for name, tensor in tensors.items():
            if name.startswith(f"{self.branch_end}."):
                tensor.mul_(scale)

    def initial_shared(self, seed: int) -> dict[str, Tensor]:
        """timm's initial values of the shared parameters, {timm name: float32 tensor}."""
        return self._initial(seed, "shared", lambda name: not name.startswith(self._pool_prefixes))

    def initial_block(self, seed: int, block: int) -> dict[str, Tensor]:
        """timm's initial values of one pool block, {name inside the block: float32 tensor}."""
        prefix = self.block_prefix(block)
        values = self._initial(seed, f"block {block}", lambda name: name.startswith(prefix))
        return {name.removeprefix(prefix): value for name, value in values.items()}

    def _initial(self, seed: int, piece: str, belongs: Callable[[str], bool]) -> dict[str, Tensor]:
        """Run timm's constructor with everything but one piece on meta, under that piece's seed.

        Nothing on meta draws random numbers, so a piece's values depend on (seed, piece) alone.
        """
        position = iter(self._registered)
        values: dict[str, Tensor] = {}

        def materialise(tensor: Tensor) -> Tensor | None:
            name = next(position)
            if name is None or not isinstance(tensor, nn.Parameter) or not belongs(name):
                return None
            values[name] = nn.Parameter(torch.empty(tensor.shape, dtype=tensor.dtype))
            return values[name]

        digest = hashlib.blake2b(f"{seed} {piece}".encode(), digest_size=8).digest()
        with torch.random.fork_rng(devices=[]), _registrations(materialise):
            torch.default_generator.manual_seed(int.from_bytes(digest, "little"))  # the CPU's alone
            _construct(self.name, self.num_classes)
        return {name: value.detach() for name, value in values.items()}

    def _check_foldable(self) -> None:
        """Compare a folded block with a scaled residual in numbers, in float64.

        Weight standardisation undoes a scaled weight, and squeeze-and-excitation after the last norm
        is not linear in it: such blocks could never leave the trainer as a plain timm model.
        """
        generator = torch.Generator().manual_seed(0)
        block = self.pool_block().eval()
        # `to_empty` would ask the meta tensors for their likes, for which torch imports sympy.
        empty = {
            name: torch.empty(t.shape, dtype=torch.float64 if t.is_floating_point() else t.dtype)
            for name, t in block.state_dict().items()
        }
        block.load_state_dict(empty, assign=True)
        with torch.no_grad():
            for tensor in (*block.parameters(), *block.buffers()):
                if tensor.ndim > 1:  # weights that keep the residual near 1, so that no sigmoid saturates
                    tensor.copy_(
                        torch.randn(tensor.shape, generator=generator).div_(tensor[0].numel() ** 0.5)
                    )
                elif tensor.is_floating_point():  # affine parameters and statistics; variances are positive
                    tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
            channels = next(m for m in block.modules() if isinstance(m, nn.Conv2d)).in_channels
            x = torch.rand(1, channels, 4, 4, generator=generator, dtype=torch.float64) + 1.0
            full = block(x.clone())
            self.fold(dict(block.named_parameters()), 0.5)
            folded = block(x.clone())
        alive = (full > 0) & (folded > 0)  # the last ReLU of a post-activation block is linear there
        exact = torch.allclose((folded - x)[alive], 0.5 * (full - x)[alive], rtol=1e-9, atol=1e-9)
        if not exact or not alive.any() or torch.equal(full, x):
            raise UserError(
                f"--model {self.name}: a residual scale cannot be folded into its blocks (weight "
                f"standardisation or attention after the last norm). {_families()}"
            )


def shapes_of(name: str) -> dict[str, tuple[int, ...]]:
    """{timm name: shape} of every parameter of a net that ResIST knows, the classifier's last."""
    net = (_cifar_net if name in CIFAR_NETS else _timm_net)(name, 1)
    return {n: tuple(p.shape) for n, p in net.named_parameters()}


def _families() -> str:
    names = ", ".join((*TESTED, *CIFAR_NETS))
    return f"Models that can: {names}, and timm nets built of the same blocks."


def _structure(block: nn.Module) -> tuple[object, ...]:
    """What makes two blocks interchangeable: classes, plain attributes and shapes.

    (`repr` would merge some that differ.)
    """
    plain = (int, float, str, bool, tuple, type(None))
    return tuple(
        (name, type(m), *((k, v) for k, v in sorted(vars(m).items()) if isinstance(v, plain)))
        for name, m in block.named_modules()
    ) + tuple((name, tuple(t.shape)) for name, t in (*block.named_parameters(), *block.named_buffers()))
