"""The blueprint against timm itself: names, shapes, initial values, and what a folded block computes."""

import functools
import math
import re
from contextlib import contextmanager

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from resist_ds.errors import UserError
from resist_ds.nets.blueprint import _ENTRIES, CIFAR_NETS, Blueprint
from resist_ds.nets.subnet import bind

GOLDEN_BLOCK = [-0.02206, 0.02365, -0.04199]
GOLDEN_SHARED = [-0.11861, 0.01161, -0.00559]
CLASSES = 100  # enough that the classifier's bias says something about its distribution
SMALL = CIFAR_NETS["preact_resnet_small"]  # the demo's own; the others are the paper's
PREACT = {  # the paper's nets, in the words that timm's constructor takes (and P)
    "preact_resnet_small": (dict(layers=SMALL[0], channels=SMALL[1], stem_chs=SMALL[1][0]), SMALL[0][2] - 1),
    "preact_resnet101": (dict(layers=(3, 4, 23, 3)), 22),
    "preact_resnet152": (dict(layers=(3, 4, 36, 3)), 35),
    "preact_resnet200": (dict(layers=(3, 4, 50, 3)), 49),
}
POOLS = {
    **{f"resnetv2_{depth}": pool for depth, pool in ((18, 1), (34, 5), (50, 5), (101, 22), (152, 35))},
    **{f"resnet{depth}": pool for depth, pool in ((50, 5), (101, 22), (152, 35))},
    **{name: pool for name, (_, pool) in PREACT.items()},
}
MODELS = sorted(POOLS)


pytestmark = pytest.mark.usefixtures("fixed_threads")


@functools.cache
def blueprint(name, classes=CLASSES):
    return Blueprint(name, classes)


def timm_net(name, classes=CLASSES, device=None):
    """The model as a user of timm alone would make it; a CIFAR net's stem is replaced in two lines."""
    if name not in PREACT:
        return timm.create_model(name, num_classes=classes, device=device)
    net = timm.create_model("resnetv2_34", num_classes=classes, device=device, **PREACT[name][0])
    width = PREACT[name][0].get("stem_chs", 64)
    net.stem = nn.Sequential()
    net.stem.add_module("conv", nn.Conv2d(3, width, 3, padding=1, bias=False, device=device))
    return net


def pieces(plan, seed):
    """{timm name: initial value} of the whole global model, put together from its pieces."""
    values = dict(plan.initial_shared(seed))
    for block in range(plan.pool):
        # Of a deep net, three blocks are drawn and stand for all, each a little larger than the one before.
        drawn = plan.initial_block(seed, block) if block < 3 or plan.pool < 10 else None
        source = plan.block_prefix(block if drawn else block % 3)
        for name, _ in plan.block:
            value = drawn[name] if drawn else values[source + name] * (1 + block / 100)
            values[plan.block_prefix(block) + name] = value
    return values


class Allocations(TorchDispatchMode):
    """{address: elements} of the tensors that operators make outside of the meta device.

    Every storage is kept until the end: the address of a freed one could come again and hide another.
    """

    def __init__(self):
        super().__init__()
        self.made = {}
        self.kept = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and not out.is_meta:
            storage = out.untyped_storage()
            self.kept.append(storage)
            self.made[storage.data_ptr()] = max(
                storage.nbytes() // out.itemsize, self.made.get(storage.data_ptr(), 0)
            )
        return out


@contextmanager
def seeded(seed):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


# --- names and shapes


@pytest.mark.parametrize("name", MODELS)
def test_names_and_shapes_are_timms(name):
    plan, net = blueprint(name), timm_net(name, device="meta")
    expected = [(n, tuple(p.shape)) for n, p in net.named_parameters()]
    shapes = dict(plan.shared)
    assert len(shapes) == len(plan.shared)
    for block in range(plan.pool):
        named = {plan.block_prefix(block) + n: shape for n, shape in plan.block}
        assert not named.keys() & shapes.keys()
        shapes |= named
    assert shapes == dict(expected)
    assert plan.pool == POOLS[name]
    assert plan.parameters == sum(math.prod(shape) for _, shape in expected)
    assert plan.parameters_held(plan.pool) == plan.parameters
    assert plan.parameters_held(1) == sum(p.numel() for p in plan.subnet(1).parameters())
    # The first, strided block of section 3 is shared; the pool is the rest of that section.
    assert [n for n in shapes if n.startswith(plan.block_prefix(0))]
    assert all(n in dict(plan.shared) for n, _ in expected if n.startswith(plan.family.section + ".0."))


@pytest.mark.parametrize("name", ["resnetv2_34", "resnet50", "preact_resnet_small"])
def test_a_subnet_is_the_same_net_with_fewer_blocks(name):
    plan = blueprint(name)
    whole = {n: p.shape for n, p in timm_net(name, device="meta").named_parameters()}
    for slots in (1, 3, plan.pool):
        net = plan.subnet(slots)
        assert all(p.is_meta for p in (*net.parameters(), *net.buffers()))
        absent = tuple(plan.block_prefix(block) for block in range(slots, plan.pool))
        assert {n: p.shape for n, p in net.named_parameters()} == {
            n: shape for n, shape in whole.items() if not n.startswith(absent)
        }
    assert all(p.is_meta for p in (*plan.pool_block().parameters(), *plan.pool_block().buffers()))


@pytest.mark.parametrize("name", ["resnetv2_152", "resnet152", "preact_resnet200"])
def test_a_blueprint_and_a_piece_cost_the_memory_of_one_block(name):
    with Allocations() as allocations:
        plan = Blueprint(name, CLASSES)
    block = sum(math.prod(shape) for _, shape in plan.block)
    assert max(allocations.made.values()) < block
    # The numeric check that a scale can be folded runs one block, made in float32 and cast to float64.
    assert block < sum(allocations.made.values()) < 4 * block < plan.parameters / 10
    with Allocations() as allocations:
        values = plan.initial_block(0, plan.pool - 1)
    assert block <= sum(allocations.made.values()) < 1.01 * block
    assert sum(v.numel() for v in values.values()) == block


# --- initial values


@pytest.mark.numerical
@pytest.mark.parametrize("name", MODELS)
def test_initial_values_are_distributed_as_timms(name):
    """Mean, spread and mean size of every tensor of shared and of two blocks (the others are made alike).

    Of a large tensor the first 65,536 numbers are looked at. Two samples of n numbers, ours and timm's: their
    means differ by σ√(2/n) or so, and 6 times that is allowed; what is constant in timm (ones, zeros,
    zero_init_last) must be exactly so here.
    """
    plan = blueprint(name)
    with seeded(0):
        theirs = dict(timm_net(name).named_parameters())
    if name in CIFAR_NETS:  # the replaced stem has no values of timm's: its rule for convolutions is
        stem = theirs["stem.conv.weight"].detach()
        with seeded(1):
            nn.init.kaiming_normal_(stem, mode="fan_out", nonlinearity="relu")
    ours = plan.initial_shared(3)
    for block in {0, plan.pool - 1}:
        ours |= {plan.block_prefix(block) + n: v for n, v in plan.initial_block(3, block).items()}
    for tensor, value in ours.items():
        expected = theirs[tensor].detach()
        assert value.dtype == torch.float32 and value.device.type == "cpu", tensor
        if expected.min() == expected.max():
            assert torch.equal(value, expected), tensor
            continue
        value, expected = (t.flatten()[: 1 << 16] for t in (value, expected))
        tolerance = 6 * math.sqrt(2 / value.numel()) * expected.std()
        for moment in (torch.mean, torch.std, lambda t: t.abs().mean()):
            assert abs(moment(value) - moment(expected)) < tolerance, tensor
    # The residual branches of post-activation nets start at zero in timm, those of the others do not.
    last = ours[f"{plan.block_prefix(0)}{plan.branch_end}.weight"]
    assert (last == 0).all() if plan.branch_end == "bn3" else (last != 0).any()


@pytest.mark.numerical
@pytest.mark.parametrize("name", ["resnet50", "preact_resnet_small"])
def test_values_depend_on_seed_and_piece_alone(name):
    plan = blueprint(name)
    with seeded(1):
        before = torch.get_rng_state()
        shared, third, first = plan.initial_shared(7), plan.initial_block(7, 3), plan.initial_block(7, 0)
        assert torch.equal(torch.get_rng_state(), before)
    with seeded(2):  # another order, another global state, a blueprint of its own
        torch.rand(5)
        before = torch.get_rng_state()
        again = Blueprint(name, CLASSES)
        repeated = again.initial_block(7, 0), again.initial_block(7, 3), again.initial_shared(7)
        assert torch.equal(torch.get_rng_state(), before)
    for values, expected in zip(repeated, (first, third, shared), strict=True):
        assert values.keys() == expected.keys()
        assert all(torch.equal(values[n], expected[n]) for n in values)
    drawn = [n for n, v in first.items() if v.min() != v.max()]
    assert drawn
    for n in drawn:
        assert not torch.equal(first[n], third[n]), "blocks must differ"
        assert not torch.equal(first[n], again.initial_block(8, 0)[n]), "seeds must differ"
    drawn = [n for n, v in shared.items() if v.min() != v.max()]
    other = plan.initial_shared(8)
    assert drawn and not any(torch.equal(shared[n], other[n]) for n in drawn)


@pytest.mark.numerical
def test_initial_values_stay_what_they_are():
    """Golden values, to notice a change of a piece's seed. (Not to the bit: torch's generator may change.)"""
    plan = blueprint("preact_resnet101", 10)
    block = plan.initial_block(0, 2)["conv1.weight"].double()
    shared = plan.initial_shared(0)["stem.conv.weight"].double()
    assert block.flatten()[:3].tolist() == pytest.approx(GOLDEN_BLOCK, abs=1e-5)  # five digits
    assert shared.flatten()[:3].tolist() == pytest.approx(GOLDEN_SHARED, abs=1e-5)  # five digits


# --- the CIFAR nets


@pytest.mark.parametrize(
    ("name", "millions"),
    [("preact_resnet101", 41.35), ("preact_resnet152", 56.70), ("preact_resnet200", 73.23)],
)
def test_the_papers_nets_have_the_papers_size(name, millions):
    plan = blueprint(name, 10)
    assert round(plan.parameters / 1e6, 2) == millions
    assert dict(plan.shared)["stem.conv.weight"] == (64, 3, 3, 3)
    assert timm_net(name, 10, "meta")(torch.empty(1, 3, 32, 32, device="meta")).shape == (1, 10)
    stem = plan.subnet(1).get_submodule("stem")
    assert stem(torch.empty(1, 3, 32, 32, device="meta")).shape == (1, 64, 32, 32)  # stride 1, no pool


@pytest.mark.parametrize("name", ["preact_resnet_small", "preact_resnet101"])
def test_a_cifar_net_loads_strictly_into_stock_timm(name):
    plan = blueprint(name, 10)
    values = pieces(plan, 5)
    net = timm_net(name, 10).eval()
    buffers = {n: b for n, b in net.named_buffers()}
    net.load_state_dict(values | buffers, strict=True)
    ours = plan.subnet(plan.pool)
    bind(ours, values)
    ours.eval()
    with seeded(0), torch.no_grad():
        x = torch.randn(2, 3, 32, 32)
        logits = ours(x)
        assert torch.equal(logits, net(x))
        assert logits.std() > 1e-3


# --- the table of families

FAMILIES = ["resnetv2_18", "resnetv2_50", "resnet34", "resnet50", "resnetv2_50d", "preact_resnet_small"]


@pytest.mark.numerical
@pytest.mark.parametrize("name", FAMILIES)
def test_the_parts_in_sequence_are_the_whole(name):
    plan = blueprint(name)
    with seeded(0), torch.no_grad():
        net = timm_net(name).eval()
        for tensor in (*net.parameters(), *net.buffers()):
            if tensor.ndim == 1 and tensor.is_floating_point():  # norms that do something, no zero branches
                tensor.uniform_(0.5, 1.5)
        x = torch.randn(2, 3, 32, 32)
        expected = net(x.clone())
        blocks = [plan.block_prefix(block).rstrip(".") for block in range(plan.pool)]
        for path in (*plan.family.before, *blocks, *plan.family.after):
            x = net.get_submodule(path)(x)
    assert torch.equal(x, expected)
    assert expected.std() > 1e-3


@pytest.mark.numerical
@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("scale", [0.25, 1.0])
def test_a_folded_block_scales_its_residual(name, scale):
    """Against the residual branch computed by hand, module by module, in float64."""
    plan = blueprint(name)
    with seeded(0), torch.no_grad():
        block = plan.pool_block().to_empty(device="cpu").double().eval()
        for tensor in (*block.parameters(), *block.buffers()):
            if tensor.is_floating_point():
                tensor.uniform_(0.5, 1.5) if tensor.ndim == 1 else tensor.normal_(std=0.1)
        x = torch.randn(2, block.get_submodule("conv1").in_channels, 5, 5, dtype=torch.float64)
        convolutions = 2 + hasattr(block, "conv3")
        residual = x
        for i in range(1, convolutions + 1):
            conv = block.get_submodule(f"conv{i}")
            if name.startswith("resnetv2") or name.startswith("preact"):
                norm = block.get_submodule(f"norm{i}")
                statistics = norm.running_mean, norm.running_var, norm.weight, norm.bias
                residual = conv(F.batch_norm(residual, *statistics, eps=norm.eps).relu())
            else:
                norm = block.get_submodule(f"bn{i}")
                residual = norm(conv(residual)).relu() if i < convolutions else norm(conv(residual))
        expected = x + scale * residual
        if not (name.startswith("resnetv2") or name.startswith("preact")):
            expected = expected.relu()
        tensors = dict(block.named_parameters())
        unscaled = {n: t.clone() for n, t in tensors.items()}
        plan.fold(tensors, scale)
        assert torch.allclose(block(x.clone()), expected, rtol=1e-12, atol=1e-12)
        changed = {n.rpartition(".")[0] for n, t in tensors.items() if not torch.equal(t, unscaled[n])}
        assert changed == ({plan.branch_end} if scale != 1 else set())


# --- refusals


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("resnet5O", r"unknown --model resnet5O \(nearest: .*resnet50.*\)"),
        ("preact_resnet110", r"unknown --model preact_resnet110 \(nearest: .*preact_resnet101.*\)"),
        ("", "unknown --model"),
    ],
)
def test_an_unknown_name_is_answered_with_the_nearest(name, says):
    with pytest.raises(UserError, match=says) as caught:
        Blueprint(name, 10)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("vit_tiny_patch16_224", "no family"),
        ("convnext_atto", "no family"),
        ("skresnet18", "no family"),  # timm's ResNet class, with another block
        ("resnetv2_50x1_bit", "cannot be folded"),  # weight standardisation undoes it
        ("resnet50.foo", "Invalid pretrained tag"),
        ("seresnet18", "cannot be folded"),  # squeeze-and-excitation after the last norm
        ("ecaresnet50t", "cannot be folded"),
        ("resnetblur18", "keeps state that is not BatchNorm's"),
        ("resnet10t", "no run of identical blocks"),
    ],
)
def test_a_model_that_cannot_be_partitioned_is_refused(name, says):
    with pytest.raises(UserError, match=says) as caught:
        Blueprint(name, 10)
    message = str(caught.value)
    assert "\n" not in message and f"--model {name}" in message
    named = set(re.findall(r"[a-z0-9_]+", message))
    assert {"resnetv2_18", "resnet50", "resnet152", "preact_resnet_small", "preact_resnet200"} <= named


def test_a_block_that_differs_in_an_attribute_alone_is_no_run_of_identical_blocks(monkeypatch):
    """Dilation changes no shape, and `repr` of a whole block may hide what a block computes."""
    plain = _ENTRIES["resnetv2_34"]

    def odd(*args, **kwargs):
        net = plain(*args, **kwargs)
        net.stages[2].blocks[3].norm2.eps = 1e-3
        return net

    monkeypatch.setitem(_ENTRIES, "resnetv2_34", odd)
    with pytest.raises(UserError, match="no run of identical blocks"):
        Blueprint("resnetv2_34", 10)
