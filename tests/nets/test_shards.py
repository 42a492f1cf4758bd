"""Rows of tensors among lanes: nothing is lost, nothing is held twice, and the spare places stay zero."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from resist_ds.nets.shards import join, join_part, place, rows, used
from resist_ds.nets.subnet import OptimizerState, PartLayout

LANES = st.integers(1, 9)
SHAPES = st.lists(st.integers(1, 5), min_size=0, max_size=3).flatmap(
    lambda rest: st.integers(1, 40).map(lambda first: (first, *rest))
)


def values(*shape: int) -> torch.Tensor:
    """Numbers that are all different, and none zero."""
    return torch.arange(1, math.prod(shape) + 1, dtype=torch.float32).view(shape)


@given(SHAPES, LANES)
def test_lanes_cut_a_tensor_as_fsdp2_does(shape: tuple[int, ...], lanes: int) -> None:
    """`torch.chunk`, with nothing for those lanes that it makes no chunk for."""
    whole = values(*shape)
    parts = [rows(whole, lane, lanes) for lane in range(lanes)]
    chunks = torch.chunk(whole, lanes)
    assert all(torch.equal(part, chunk) for part, chunk in zip(parts, chunks, strict=False))
    assert all(not len(part) for part in parts[len(chunks) :])
    assert torch.equal(torch.cat(parts), whole)
    assert all(part.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr() for part in parts)


@given(SHAPES, LANES)
def test_what_is_placed_comes_together_again(shape: tuple[int, ...], lanes: int) -> None:
    whole, each = values(*shape), -(-shape[0] // lanes)
    places = [torch.zeros(each, *shape[1:]) for _ in range(lanes)]
    for lane, part in enumerate(places):
        place(whole, part, lane, lanes)
        filled = used(part, shape[0], lane)
        assert torch.equal(filled, rows(whole, lane, lanes))
        assert not part[len(filled) :].any()  # what takes part in sums and codes must be zero
    assert sum(int(part.count_nonzero()) for part in places) == whole.numel()
    out = torch.full_like(whole, math.nan)
    join(places, out)
    assert torch.equal(out, whole)


@given(LANES, st.integers(0, 8))
def test_every_lane_has_a_step_counter(lanes: int, lane: int) -> None:
    counter = torch.zeros(())
    place(torch.tensor(7.0), counter, min(lane, lanes - 1), lanes)
    assert counter == 7


@given(st.lists(SHAPES, min_size=1, max_size=6), LANES, st.booleans())
def test_a_part_comes_together_from_the_lanes_vectors(
    shapes: list[tuple[int, ...]], lanes: int, channels_last: bool
) -> None:
    named = tuple((f"tensor{i}", shape) for i, shape in enumerate(shapes))
    state = OptimizerState(("exp_avg", "exp_avg_sq"), "step")
    whole = PartLayout(named, state, channels_last)
    lane_s = PartLayout(named, state, channels_last, lanes)
    assert lane_s.parameters <= whole.parameters // lanes + sum(32 + math.prod(s[1:]) for s in shapes)
    vector = torch.zeros(whole.numel)
    for i, tensors in enumerate(whole.tensors(vector).values(), start=1):
        for kind in tensors.values():
            kind.copy_(i * values(*kind.shape))
    vectors = [torch.zeros(lane_s.numel) for _ in range(lanes)]
    for lane, of_lane in enumerate(vectors):
        for name, tensors in lane_s.tensors(of_lane).items():
            for kind, part in tensors.items():
                place(whole.tensors(vector)[name][kind], part, lane, lanes)
    out = torch.zeros(whole.parameters)
    join_part(lane_s, whole, vectors, out)
    assert torch.equal(out, vector[: whole.parameters])


@pytest.mark.parametrize("lanes", [2, 3])
def test_a_lane_s_layout_begins_where_a_whole_one_does(lanes: int) -> None:
    """Matrices before one-dimensional tensors, each on its boundary."""
    named = (("bias", (10,)), ("weight", (10, 3, 3, 3)), ("norm", (16,)))
    layout = PartLayout(named, OptimizerState(("momentum_buffer",)), lanes=lanes)
    assert dict(layout.held) == {
        "bias": (-(-10 // lanes),),
        "weight": (-(-10 // lanes), 3, 3, 3),
        "norm": (-(-16 // lanes),),
    }
    assert layout.offsets["weight"] == 0 and layout.offsets["bias"] >= layout.matrices
    assert all(offset % 32 == 0 for offset in layout.offsets.values())
