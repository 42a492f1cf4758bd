"""The sub-ResNet as views of one flat vector, the workers that take turns in it, and their local steps."""

import copy
import functools
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from resist_ds.comm import Comm
from resist_ds.engines.engine import TorchEngine
from resist_ds.engines.local import local_steps
from resist_ds.engines.rates import learning_rate
from resist_ds.engines.workers import Workers
from resist_ds.nets.blueprint import Blueprint
from resist_ds.nets.precision import autocast
from resist_ds.nets.subnet import ALIGNMENT, StateLayout, Subnet, Worker, bind
from resist_ds.options.config import Config
from resist_ds.protocol.partition import Layout, sample_partition

CPU = torch.device("cpu")
MODEL = "preact_resnet_small"
OPTIMIZERS = {
    "plain": dict(momentum=0.0),
    "momentum": dict(momentum=0.9),
    "nesterov": dict(momentum=0.9, nesterov=True),
    "adamw": dict(optimizer="adamw"),
}
STATES = {"plain": (), "adamw": ("exp_avg", "exp_avg_sq", "step")}  # the others: ("momentum_buffer",)


pytestmark = [pytest.mark.usefixtures("fixed_threads"), pytest.mark.numerical]


def options(**given):
    return Config(**dict(model=MODEL, mixed_precision="no", schedule="constant", lr=0.05) | given)


@functools.cache
def blueprint(name=MODEL):
    plan = Blueprint(name, 10)
    for method in ("initial_shared", "initial_block"):  # timm's constructor takes most of such small tests
        setattr(plan, method, functools.cache(getattr(plan, method)))
    return plan


def subnet_of(config, slots=2):
    plan = blueprint(config.model)
    return Subnet(plan, StateLayout.of(plan, config, slots), config, CPU)


def workers_of(config, deal, rank=0, ranks=1):
    place = SimpleNamespace(rank=rank, size=ranks, device=CPU)  # all that Workers wants of a Comm
    return Workers(place, Layout(deal.workers, ranks), blueprint(config.model), config, deal)


def trained_values(subnet):
    """Fill a sub-ResNet's vector with timm's initial values, so that training it makes sense."""
    plan, layout = blueprint(), subnet.layout
    parts = [(layout.shared, layout.shared_part(subnet.vector), plan.initial_shared(1))]
    for slot in range(layout.slots):
        parts.append((layout.block, layout.slot_part(subnet.vector, slot), plan.initial_block(1, slot)))
    for part, vector, values in parts:
        for name, view in part.views(vector).items():
            view.copy_(values[name])
    subnet.refresh()
    return subnet


def batches(count, size=8, seed=0, dtype=torch.float32, img=16):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        x = torch.randn(size, 3, img, img, generator=generator, dtype=torch.float64).to(dtype)
        yield x, torch.randint(10, (size,), generator=generator)


def tensors_of(subnet):
    """{(name, "parameter" or the state's name): tensor} of all that the optimizer works on."""
    found = {}
    for name, parameter in subnet.weights.items():
        found[name, "parameter"] = parameter.detach()
        for key, value in subnet.optimizer.state[parameter].items():
            found[name, key] = value
    return found


def plain_copy(subnet, kind, config):
    """The same net with tensors of its own, and an optimizer as anyone would make it."""
    net = blueprint(config.model).subnet(subnet.layout.slots)
    bind(net, {n: p.detach().clone() for n, p in subnet.weights.items()})
    if kind == "adamw":
        optimizer = torch.optim.AdamW(
            net.parameters(), config.lr, weight_decay=config.weight_decay, fused=True
        )
    else:
        optimizer = torch.optim.SGD(
            net.parameters(), config.lr, weight_decay=config.weight_decay, **OPTIMIZERS[kind]
        )
    return net.train(), optimizer


def assert_same_state(subnet, net, optimizer):
    ours = tensors_of(subnet)
    for name, parameter in net.named_parameters():
        assert torch.equal(ours[name, "parameter"], parameter), name
        for key, value in optimizer.state[parameter].items():
            if value is not None:
                assert torch.equal(ours[name, key], value), (name, key)


# --- views


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_every_tensor_is_a_view_of_its_own_stretch_of_the_vector(kind, channels_last):
    subnet = subnet_of(options(channels_last=channels_last, **OPTIMIZERS[kind]))
    layout, vector = subnet.layout, subnet.vector
    assert vector.numel() == layout.numel < 2**24  # so that float32 tells the places apart
    vector.copy_(torch.arange(vector.numel()))
    tensors = tensors_of(subnet)
    names = {n for n, _ in subnet.module.named_parameters()}
    states = STATES.get(kind, ("momentum_buffer",))
    assert tensors.keys() == {(n, key) for n in names for key in ("parameter", *states)}
    taken = torch.zeros(vector.numel(), dtype=torch.int64)
    for (name, key), tensor in tensors.items():
        if channels_last and tensor.ndim == 4:
            assert tensor.is_contiguous(memory_format=torch.channels_last)
            places = tensor.permute(0, 2, 3, 1).flatten().long()
        else:
            places = tensor.flatten().long()
        start, end = int(places[0]), int(places[0]) + tensor.numel()
        assert torch.equal(places, torch.arange(start, end)), "one contiguous stretch, in memory order"
        assert key == "step" or start % ALIGNMENT == 0
        taken[start:end] += 1
        # What belongs to a slot lies in that slot's part, so that a block travels as one stretch.
        slots = [k for k in range(layout.slots) if name.startswith(blueprint().block_prefix(k))]
        low = layout.slot_offset(slots[0]) if slots else 0
        high = layout.slot_offset(slots[0] + 1) if slots else layout.shared.numel
        assert low <= start and end <= high
    assert taken.max() == 1, "no two tensors overlap"
    assert (taken == 0).sum() < ALIGNMENT * (len(tensors) + layout.slots + 1), "nothing but padding is unused"
    # The other way round: what a step writes into a tensor stands in the vector.
    for tensor in tensors.values():
        tensor.fill_(-1)
    assert torch.equal(vector == -1, taken == 1)


@pytest.mark.parametrize("kind", ["momentum", "adamw"])
def test_a_part_lies_at_the_same_place_whatever_the_number_of_slots(kind):
    config = options(**OPTIMIZERS[kind])
    few, many = (StateLayout.of(blueprint(), config, slots) for slots in (2, 5))
    vector = torch.arange(many.numel)
    assert torch.equal(many.shared_part(vector), few.shared_part(vector))
    assert torch.equal(many.slot_part(vector, 1), few.slot_part(vector, 1))
    parts = [many.shared_part(vector), *(many.slot_part(vector, k) for k in range(5))]
    assert torch.equal(torch.cat(parts), vector), "the parts follow each other without gaps"
    assert few.numel == many.slot_offset(2)


def test_forgetting_momentum_leaves_the_parameters():
    subnet = subnet_of(options(optimizer="adamw"), slots=3)
    subnet.vector.fill_(1)
    subnet.layout.reset_optimizer(subnet.vector)
    for (name, key), tensor in tensors_of(subnet).items():
        assert (tensor == (key == "parameter")).all(), (name, key)


# --- the optimizer


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_steps_are_those_of_a_plain_optimizer_through_slot_rewrites(kind, channels_last):
    """Bit for bit, with the blocks of two slots, and their optimizer state, exchanged half-way."""
    config = options(channels_last=channels_last, **OPTIMIZERS[kind])
    subnet = trained_values(subnet_of(config))
    net, optimizer = plain_copy(subnet, kind, config)
    places = [tensor.data_ptr() for tensor in tensors_of(subnet).values()]
    for step, (x, y) in enumerate(batches(4)):
        if step == 2:
            first, second = (subnet.layout.slot_part(subnet.vector, k) for k in (0, 1))
            kept = first.clone()
            first.copy_(second)
            second.copy_(kept)
            parameters = dict(net.named_parameters())
            for name, _ in blueprint().block:
                one, two = (parameters[blueprint().block_prefix(k) + name] for k in (0, 1))
                one.data, two.data = two.data, one.data
                optimizer.state[one], optimizer.state[two] = optimizer.state[two], optimizer.state[one]
        for module, its in ((subnet.module, subnet.optimizer), (net, optimizer)):
            F.cross_entropy(module(x), y).backward()
            its.step()
            its.zero_grad()
        assert_same_state(subnet, net, optimizer)
    assert [tensor.data_ptr() for tensor in tensors_of(subnet).values()] == places
    if kind == "adamw":
        assert {float(t) for (_, key), t in tensors_of(subnet).items() if key == "step"} == {4.0}


def test_a_parameter_without_a_gradient_has_its_state_all_the_same():
    """torch makes momentum when the first gradient comes: too late for a block that has just arrived."""
    subnet = subnet_of(options())
    subnet.optimizer.step()  # no gradient anywhere
    assert {key for _, key in tensors_of(subnet)} == {"parameter", "momentum_buffer"}


# --- local steps


def plain_loop(net, optimizer, config, data, rates):
    """What a page on training loops would write; returns (Σ loss, right answers, images)."""
    loss_sum, right, images = 0.0, 0, 0
    for (x, y), rate in zip(data, rates, strict=True):
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.zero_grad()
        size = len(x) // config.accumulation_steps
        for i in range(config.accumulation_steps):
            part, labels = x[i * size : (i + 1) * size], y[i * size : (i + 1) * size]
            with torch.autocast("cpu", torch.bfloat16, enabled=config.mixed_precision == "bf16"):
                logits = net(part)
                loss = F.cross_entropy(logits, labels, label_smoothing=config.label_smoothing)
            (loss / config.accumulation_steps).backward()
            loss_sum += loss.item() * size
            right += int((logits.argmax(1) == labels).sum())
            images += size
        if config.clip_grad:
            torch.nn.utils.clip_grad_norm_(net.parameters(), config.clip_grad)
        optimizer.step()
    return loss_sum, right, images


def run_steps(subnet, config, data, *, first=0, steps=100, scaler=None, engine=None):
    worker = Worker(0, subnet.vector, scaler or torch.amp.GradScaler("cpu", enabled=False))
    data = list(data)
    rates = [learning_rate(config, step, step / steps) for step in range(first, first + len(data))]
    engine = engine or TorchEngine(subnet, config)
    engine.load(worker)
    return local_steps(engine, iter(data), rates=rates)


@pytest.mark.parametrize(
    ("kind", "given"),
    [
        ("momentum", {}),
        ("nesterov", dict(accumulation_steps=4, channels_last=True)),
        ("adamw", dict(label_smoothing=0.1, clip_grad=0.5)),
        ("plain", dict(clip_grad=0.01, accumulation_steps=2)),
        ("momentum", dict(dtype="float64")),
        ("momentum", dict(mixed_precision="bf16", accumulation_steps=2)),
        ("adamw", dict(mixed_precision="bf16", channels_last=True, clip_grad=0.5)),
    ],
)
def test_local_steps_are_a_plain_training_loop(kind, given):
    config = options(**OPTIMIZERS[kind], **given)
    subnet = trained_values(subnet_of(config))
    net, optimizer = plain_copy(subnet, kind, config)
    before = subnet.vector.clone()
    data = list(batches(3, dtype=subnet.vector.dtype))
    if config.channels_last:
        data = [(x.contiguous(memory_format=torch.channels_last), y) for x, y in data]
    tally = run_steps(subnet, config, data)
    loss_sum, right, images = plain_loop(net, optimizer, config, data, [config.lr] * 3)
    assert_same_state(subnet, net, optimizer)
    assert not torch.equal(subnet.vector, before) and subnet.vector.isfinite().all()
    assert tally.loss == pytest.approx(loss_sum, rel=1e-6)
    assert (tally.right, tally.images) == (right, images) == (right, 24)
    assert tally.seconds > 0
    everyone = (*subnet.module.parameters(), *subnet.weights.values())
    assert all(p.grad is None for p in everyone), "gradients are freed between the steps"


def test_the_learning_rate_of_every_step_follows_the_schedule():
    config = options(schedule="cosine", lr_warmup_steps=3, lr=0.2)
    subnet = trained_values(subnet_of(config))
    net, optimizer = plain_copy(subnet, "momentum", config)
    data = list(batches(4))
    rates = [0.2 * min(1, (s + 1) / 3) * 0.5 * (1 + math.cos(math.pi * s / 10)) for s in range(1, 5)]
    run_steps(subnet, config, data, first=1, steps=10)
    plain_loop(net, optimizer, config, data, rates)
    assert_same_state(subnet, net, optimizer)


def test_schedules():
    def rates(steps, **given):
        return [learning_rate(options(**given), step, step / steps) for step in range(steps)]

    assert rates(8, schedule="step", lr=1.0) == pytest.approx([1, 1, 1, 1, 0.1, 0.1, 0.01, 0.01])
    assert rates(7, schedule="step", lr=1.0) == pytest.approx([1, 1, 1, 1, 0.1, 0.1, 0.01])
    assert rates(3, schedule="constant", lr=0.3) == [0.3] * 3
    cosine = rates(100, schedule="cosine", lr=2.0)
    assert cosine[0] == 2 and cosine[50] == pytest.approx(1) and 0 < cosine[99] < 1e-3
    assert cosine == sorted(cosine, reverse=True)
    warm = rates(8, schedule="constant", lr=1.0, lr_warmup_steps=4)
    assert warm == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1, 1, 1])
    both = rates(8, schedule="step", lr=1.0, lr_warmup_steps=6)
    assert both == pytest.approx([1 / 6, 2 / 6, 3 / 6, 4 / 6, 0.5 / 6 * 1, 0.1, 0.01, 0.01])


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_training_touches_no_buffer_of_batch_norm(precision):
    config = options(mixed_precision=precision)
    subnet = trained_values(subnet_of(config))
    buffers = dict(subnet.module.named_buffers())
    assert {n.rpartition(".")[2] for n in buffers} == {"running_mean", "running_var", "num_batches_tracked"}
    for n, buffer in buffers.items():
        buffer.fill_(7 if n.endswith("tracked") else 0.3)
    kept = copy.deepcopy(buffers)
    with autocast(config, CPU):
        logits = subnet.module(next(batches(1))[0])
    run_steps(subnet, config, batches(2))
    assert all(b is buffers[n] and torch.equal(b, kept[n]) for n, b in subnet.module.named_buffers())
    # Nor does it read them: batch statistics do the work.
    for buffer in buffers.values():
        buffer.zero_()
    again = trained_values(subnet_of(config))
    with autocast(config, CPU):
        assert torch.equal(again.module(next(batches(1))[0]), logits)


@pytest.mark.parametrize("clip", [0.0, 0.01])
def test_fp16_scales_the_loss_and_skips_a_step_that_overflows(clip):
    """The scaler of a CPU: one step with finite gradients, clipped at their true size, and one without."""
    config = options(mixed_precision="fp16", momentum=0.0, weight_decay=0.0, clip_grad=clip)
    subnet = trained_values(subnet_of(config))
    reference = trained_values(subnet_of(replace(config, mixed_precision="no")))
    before = subnet.vector.clone()
    data = list(batches(1, size=4))
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=1000)
    run_steps(subnet, config, data, scaler=scaler)
    run_steps(reference, config=replace(config, mixed_precision="no"), data=data)
    step, expected = subnet.vector - before, reference.vector - before
    assert (step - expected).norm() < 0.05 * expected.norm(), "unscaled again, up to fp16's rounding"
    before = subnet.vector.clone()
    assert scaler.get_scale() == 1024
    run_steps(subnet, config, [(data[0][0] * float("inf"), data[0][1])], scaler=scaler)
    assert torch.equal(subnet.vector, before)
    assert scaler.get_scale() == 512


def test_autocast_is_off_unless_asked_for():
    for precision, dtype in (("no", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)):
        with autocast(options(mixed_precision=precision), CPU):
            assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == dtype


@pytest.mark.parametrize("model", [MODEL, "resnetv2_18", "resnet18"])
def test_activation_checkpointing_recomputes_and_changes_nothing(model):
    calls, gradients = [], []
    for checkpointing in (False, True):
        subnet = subnet_of(options(model=model, activation_checkpointing=checkpointing), slots=1)
        generator = torch.Generator().manual_seed(3)
        for parameter in subnet.module.parameters():
            parameter.data.normal_(1 if parameter.ndim == 1 else 0, 0.1, generator=generator)
        block = subnet.module.get_submodule(blueprint(model).block_prefix(0).rstrip("."))
        count = []
        block.register_forward_pre_hook(lambda *_, count=count: count.append(1))
        x, y = next(batches(1, size=4, img=32))
        F.cross_entropy(subnet.module(x), y).backward()
        calls.append(len(count))
        gradients.append([p.grad for p in subnet.module.parameters()])
    assert calls == [1, 2]
    assert all(g is not None and torch.equal(g, h) for g, h in zip(*gradients, strict=True))


def test_a_compiled_subnet_is_compiled_once(monkeypatch):
    """Not for other blocks in its slots, another learning rate, or an evaluation in between.

    Traced for real, but run by the tracer's own `aot_eager` back end, so that no C++ compiler is needed.
    """
    torch._dynamo.reset()
    monkeypatch.setattr(
        torch, "compile", functools.partial(torch.compile, backend="aot_eager", fullgraph=True)
    )
    config = options(compile=True)
    subnet = trained_values(subnet_of(config, slots=1))
    plain = trained_values(subnet_of(replace(config, compile=False), slots=1))
    engines = {subnet: TorchEngine(subnet, config), plain: TorchEngine(plain, replace(config, compile=False))}
    assert engines[subnet].forward is not subnet.module
    data = list(batches(2))
    try:
        run_steps(subnet, config, data[:1], engine=engines[subnet])
        with torch._dynamo.config.patch(error_on_recompile=True):
            for these in (subnet, plain):
                if these is plain:
                    run_steps(plain, config, data[:1], engine=engines[plain])
                part = these.layout.slot_part(these.vector, 0)
                these.layout.block.views(part)["conv1.weight"].copy_(
                    blueprint().initial_block(9, 5)["conv1.weight"]
                )
                these.module.eval()
                hook = these.module.norm.register_forward_pre_hook(lambda *_: None)
                with torch.no_grad():
                    these.module(data[0][0])
                hook.remove()
                these.module.train()
                run_steps(these, config, data[1:], first=60, engine=engines[these])
        assert torch.allclose(subnet.vector, plain.vector, rtol=1e-4, atol=1e-6)
    finally:
        torch._dynamo.reset()


# --- workers


def vectors_after_training(config, deal, rank, ranks, steps=2):
    workers = workers_of(config, deal, rank, ranks)
    for round in range(2):
        for worker in workers.turns():
            data = list(batches(steps, seed=10 * worker.index + round))
            local_steps(workers.engine, iter(data), rates=[config.lr] * steps)
    return {w: v.clone() for w, v in workers.vectors.items()}


@pytest.mark.parametrize("kind", ["momentum", "adamw"])
def test_workers_in_turn_train_the_same_bits_as_each_alone(kind):
    config = options(**OPTIMIZERS[kind])
    deal = sample_partition(0, 0, workers=3, pool=blueprint().pool)
    together = vectors_after_training(config, deal, 0, 1)
    assert sorted(together) == [0, 1, 2]
    assert not torch.equal(together[0], together[1])
    for worker in range(3):
        alone = vectors_after_training(config, deal, worker, 3)
        assert list(alone) == [worker]
        assert torch.equal(alone[worker], together[worker])
    two = vectors_after_training(config, deal, 0, 2) | vectors_after_training(config, deal, 1, 2)
    assert all(torch.equal(two[worker], together[worker]) for worker in range(3))


def test_only_the_idle_workers_of_a_rank_have_memory_of_their_own():
    deal = sample_partition(0, 0, workers=2, pool=blueprint().pool)
    alone = workers_of(options(), deal, rank=1, ranks=2)
    assert alone.vectors[1] is alone.subnet.vector
    several = workers_of(options(), deal)
    places = {v.data_ptr() for v in (*several.vectors.values(), several.subnet.vector)}
    assert len(places) == 3


@pytest.mark.parametrize("given", [{}, dict(channels_last=True, dtype="float64", optimizer="adamw")])
def test_workers_begin_with_timms_values_whatever_w_and_k(given):
    config, plan = options(seed=4, **given), blueprint()
    shared = plan.initial_shared(4)
    for workers, least in ((1, 0), (2, 0), (3, plan.pool - 1)):
        deal = sample_partition(4, 0, workers=workers, pool=plan.pool, min_blocks=least)
        played = workers_of(config, deal)
        for worker in played.turns():
            tensors = dict(played.subnet.module.named_parameters())
            state = {k: t for k, t in tensors_of(played.subnet).items() if k[1] != "parameter"}
            assert state and not any(t.any() for t in state.values())
            for name, value in shared.items():
                assert torch.equal(tensors[name], value.to(tensors[name].dtype)), name
            for slot, block in enumerate(deal.blocks[worker.index]):
                for name, value in plan.initial_block(4, block).items():
                    ours = tensors[plan.block_prefix(slot) + name]
                    assert torch.equal(ours, value.to(ours.dtype)), (block, name)


@pytest.mark.parametrize("ranks", [1, 2])
def test_fewer_slots_keep_the_first_ones(ranks):
    plan = blueprint()
    warm = sample_partition(0, 0, workers=2, pool=plan.pool, min_blocks=plan.pool)
    config = options()
    workers = workers_of(config, warm, rank=0, ranks=ranks)
    for worker in workers.turns():
        run_steps(workers.subnet, config, batches(1, seed=worker.index))
    before = {w: v.clone() for w, v in workers.vectors.items()}
    workers.resize(3)
    assert workers.layout.slots == 3
    for w, vector in workers.vectors.items():
        assert torch.equal(vector, before[w][: workers.layout.numel])
    # The smaller net is a whole sub-ResNet: its momentum is there, it trains, and it is what is stored.
    for worker in workers.turns():
        subnet = workers.subnet
        assert sum(p.numel() for p in subnet.module.parameters()) == plan.parameters_held(3)
        assert any(t.any() for (_, key), t in tensors_of(subnet).items() if key == "momentum_buffer")
        run_steps(subnet, config, batches(1))
        assert worker.vector is subnet.vector or len(workers.vectors) > 1
    assert all(not torch.equal(v, before[w][: len(v)]) for w, v in workers.vectors.items())
    assert all((v is workers.subnet.vector) == (len(workers.vectors) == 1) for v in workers.vectors.values())


@pytest.mark.parametrize(("workers", "ranks"), [(1, 1), (3, 1), (5, 2), (12, 3)])
def test_every_tensor_of_the_global_model_is_owned_once(workers, ranks):
    plan = blueprint()
    config = options(optimizer="adamw")
    deal = sample_partition(1, 3, workers=workers, pool=plan.pool, min_blocks=2)
    state, held = {}, []
    for rank in range(ranks):
        played = workers_of(config, deal, rank, ranks)
        for worker, vector in played.vectors.items():
            vector.fill_(1000 + worker)  # so that a value tells whose it is
            for slot, block in enumerate(deal.blocks[worker]):
                played.layout.slot_part(vector, slot).fill_(100 * worker + block)
        owned = played.owned(deal)
        assert not owned.keys() & state.keys()
        state |= owned
        held.append(played)
    shapes = dict(plan.shared)
    for block in range(plan.pool):
        for name, shape in plan.block:
            shapes[plan.block_prefix(block) + name] = shape
            mark = 100 * deal.owners[block] + block
            assert all((t == mark).all() for t in state[plan.block_prefix(block) + name].values())
    assert {name: tuple(t["parameter"].shape) for name, t in state.items()} == shapes
    for tensors in state.values():
        assert list(tensors) == ["parameter", "exp_avg", "exp_avg_sq", "step"]
        assert tensors["exp_avg"].shape == tensors["parameter"].shape and tensors["step"].shape == ()
    for tensors in state.values():  # views: what is loaded into them is loaded into the workers
        for tensor in tensors.values():
            tensor.fill_(-1)
    numbers = sum(1 + 3 * math.prod(shape) for shape in shapes.values())
    assert sum(int((v == -1).sum()) for played in held for v in played.vectors.values()) == numbers


def test_a_comm_without_a_launcher_is_one_rank(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    comm = Comm()
    assert (comm.rank, comm.size, comm.backend) == (0, 1, "none")
    assert comm.gather("x") == ["x"]
