"""Data order, augmentation and data sets: keyed by (seed, epoch, sample), and one line when they fail."""

import pickle
import subprocess
import sys
import time
from hashlib import md5
from multiprocessing import active_children
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch
import torchvision
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms import v2

from resist_ds.data.datasets import Data, InMemory, OnDisk, download, load_data
from resist_ds.data.on_device import PadCropFlip
from resist_ds.data.order import Order, Purpose, crop_and_flip, keyed_hash, resized_crop
from resist_ds.data.trouble import News
from resist_ds.errors import DataError, RunError, UserError
from resist_ds.options.config import Config

CPU = torch.device("cpu")
PLAIN = {"device": CPU, "dtype": torch.float32, "channels_last": False}

# ------------------------------------------------------------------------------------------------------------
# Order


@st.composite
def orders(draw):
    workers, batch_size = draw(st.integers(1, 7)), draw(st.integers(1, 9))
    samples = draw(st.integers(workers * batch_size, 400))
    return Order(draw(st.integers(0, 2**63 - 1)), samples, workers, batch_size)


@given(orders(), st.integers(0, 3))
def test_an_epoch_deals_every_sample_at_most_once_and_drops_only_the_remainder(order, epoch):
    seen = []
    for step in range(epoch * order.steps_per_epoch, (epoch + 1) * order.steps_per_epoch):
        for worker in range(order.workers):
            at, indices = order.batch(step, worker)
            assert at == epoch and indices.shape == (order.batch_size,) and indices.dtype == np.int64
            seen.extend(indices.tolist())
    assert len(set(seen)) == len(seen) and set(seen) <= set(range(order.samples))
    assert 0 <= order.samples - len(seen) < order.workers * order.batch_size


@given(orders(), st.integers(0, 10**6), st.data())
def test_a_batch_depends_on_its_keys_and_not_on_what_was_asked_before(order, step, draw):
    worker = draw.draw(st.integers(0, order.workers - 1))
    epoch, first = order.batch(step, worker)
    expected = first.copy()
    first[:] = -1  # nor on what the caller did with it
    np.testing.assert_array_equal(order.batch(step, worker)[1], expected)
    for other in range(4):
        order.batch(step + other * order.steps_per_epoch, 0)
    again = Order(order.seed, order.samples, order.workers, order.batch_size)
    assert again.batch(step, worker)[0] == epoch
    np.testing.assert_array_equal(again.batch(step, worker)[1], expected)


@pytest.mark.numerical
def test_the_order_stays_what_it_is():
    """Golden values: a run must train on the same batches next year. The hash is splitmix64's sequence."""
    # The state after no keys is 0, so counter 0 gives the generator's known first output from seed 0.
    assert keyed_hash((), np.arange(1)).tolist() == [0xE220A8397B1DCDAF]
    assert keyed_hash((3, -1, 2**70 + 5), np.array([[0, 9]])).tolist() == GOLDEN_HASH
    assert [Order(7, 20, 2, 3).batch(step, 1)[1].tolist() for step in (0, 2, 3)] == GOLDEN_BATCHES
    crops = crop_and_flip(7, 1, np.arange(5), 4)
    assert [values.tolist() for values in crops] == GOLDEN_CROPS
    assert resized_crop(7, 1, 3, 500, 375) == GOLDEN_BOX


def test_every_sample_is_equally_likely_everywhere():
    order, epochs = Order(0, 24, 3, 2), 1500
    counts = np.zeros((24, 24))
    for epoch in range(epochs):
        first = epoch * order.steps_per_epoch
        drawn = [order.batch(first + s, w)[1] for s in range(order.steps_per_epoch) for w in range(3)]
        counts[np.arange(24), np.concatenate(drawn)] += 1
    expected = epochs / 24
    chi2 = ((counts - expected) ** 2 / expected).sum() / 23**2  # its mean is 1, its spread 0.06
    assert 0.7 < chi2 < 1.3


def test_different_seeds_and_epochs_give_different_orders():
    drawn = {tuple(Order(seed, 64, 1, 64).batch(epoch, 0)[1]) for seed in range(8) for epoch in range(8)}
    assert len(drawn) == 64


@pytest.mark.parametrize(
    ("samples", "workers", "remedy"),
    [(100, 4, "--batch_size 25"), (3, 4, "--workers 3"), (0, 1, "--data_dir")],
)
def test_too_few_samples_say_what_to_type(samples, workers, remedy):
    with pytest.raises(UserError, match=f"too few samples for one batch per worker.*type.*{remedy}"):
        Order(0, samples, workers, 32)


def test_purposes_are_distinct():
    values = np.concatenate([keyed_hash((purpose, 0, 0), np.arange(100)) for purpose in Purpose])
    assert len(np.unique(values)) == 100 * len(Purpose)


# ------------------------------------------------------------------------------------------------------------
# Augmentation


@given(st.integers(1, 900), st.integers(1, 900), st.integers(0, 10**7))
def test_a_resized_crop_lies_within_the_image(width, height, sample):
    (left, top, right, bottom), _ = resized_crop(0, 0, sample, width, height)
    assert 0 <= left < right <= width and 0 <= top < bottom <= height


def test_resized_crops_have_the_usual_distribution():
    """Area 8 to 100 %, uniform but for tries that do not fit; ratio 3/4 … 4/3; half of them flipped."""
    boxes, flips = zip(*(resized_crop(0, 0, sample, 400, 400) for sample in range(2000)), strict=True)
    left, top, right, bottom = np.array(boxes).T
    area = (right - left) * (bottom - top) / 400**2
    ratio = (right - left) / (bottom - top)
    assert area.min() < 0.09 and area.max() > 0.95 and 0.45 < area.mean() < 0.54
    assert 0.74 < ratio.min() < 0.76 and 1.32 < ratio.max() < 1.35 and abs(np.log(ratio).mean()) < 0.02
    assert abs(np.mean(flips) - 0.5) < 0.05
    assert abs(((left + right) / 2 - 200).mean()) < 5 and (left == 0).mean() < 0.1


def test_crops_are_uniform_and_independent():
    top, left, flip = crop_and_flip(0, 0, np.arange(81 * 2 * 200), pad=4)
    counts = np.bincount((top * 9 + left) * 2 + flip, minlength=162)
    assert len(counts) == 162 and 0.7 < ((counts - 200) ** 2 / 200).sum() / 161 < 1.3


@pytest.mark.numerical
def test_pad_crop_flip_is_the_plain_one():
    images = torch.randint(
        0, 256, (40, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    samples = np.arange(100, 140)
    for flip in (True, False):
        got = PadCropFlip(5, 140, flip)(images, 3, torch.from_numpy(samples))
        for image, out, top, left, mirrored in zip(
            images, got, *crop_and_flip(5, 3, samples, 4), strict=True
        ):
            expected = v2.functional.crop(v2.functional.pad(image, [4]), int(top), int(left), 32, 32)
            expected = v2.functional.hflip(expected) if mirrored and flip else expected
            assert torch.equal(out, expected)


def batches(data: Data, schedule, **changed) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return list(data.train_batches(schedule, **{**PLAIN, **changed}))


@pytest.mark.numerical
def test_a_sample_looks_the_same_in_whatever_batch_it_comes():
    data = load_data(Config(dataset="synthetic"))
    samples = np.arange(60)
    (together, labels), (next_epoch, _) = batches(data, [(2, samples), (3, samples)])
    order = np.random.default_rng(0).permutation(60)
    apart = batches(data, [(2, part) for part in np.array_split(order, 7)])
    assert torch.equal(torch.cat([x for x, _ in apart]), together[order])
    assert torch.equal(torch.cat([y for _, y in apart]), labels[order])
    same = (together == next_epoch).flatten(1).all(1)
    assert same.float().mean() < 0.1  # another epoch, other crops
    other_seed = load_data(Config(dataset="synthetic", seed=1))
    assert not torch.equal(batches(other_seed, [(2, samples)])[0][0], together)
    plain = load_data(Config(dataset="synthetic", augment=False))
    assert torch.equal(batches(plain, [(2, samples)])[0][0], data.train_images(samples, **PLAIN))


@pytest.mark.numerical
def test_float32_values_are_the_rounded_float64_ones_in_both_memory_formats():
    data = load_data(Config())
    schedule = [(0, np.arange(50))]
    for channels_last in (False, True):
        (exact, labels), (rounded, _) = (
            batches(data, schedule, dtype=dtype, channels_last=channels_last)[0]
            for dtype in (torch.float64, torch.float32)
        )
        assert exact.dtype == torch.float64 and labels.dtype == torch.int64
        assert torch.equal(exact.float(), rounded)
        wanted = torch.channels_last if channels_last else torch.contiguous_format
        assert rounded.is_contiguous(memory_format=wanted)
        plain = data.train_images(np.arange(50), CPU, torch.float32, channels_last)
        assert plain.is_contiguous(memory_format=wanted)


@pytest.mark.numerical
@pytest.mark.parametrize("name", ["digits", "synthetic"])
def test_training_images_are_normalised_to_mean_0_and_spread_1(name):
    data = load_data(Config(dataset=name))
    images = data.train_images(np.arange(data.train_size), CPU, torch.float64, False)
    assert images.mean((0, 2, 3)).abs().max() < 0.005
    assert (images.std((0, 2, 3)) - 1).abs().max() < 0.005


def test_nothing_reads_or_moves_the_global_random_state(folder):
    def run(seed: int) -> list[torch.Tensor]:
        torch.manual_seed(seed)
        np.random.seed(seed)
        before = torch.get_rng_state()
        out = []
        for config in (
            Config(),
            Config(**folder, data_workers=0),
            Config(**folder, img_size=72, data_workers=0),
        ):
            data = load_data(config)
            out += [x for x, _ in batches(data, [(0, np.arange(8)), (1, np.arange(8))])]
            out += [x for x, _ in data.test_batches([np.arange(4)], **PLAIN)]
        assert torch.equal(torch.get_rng_state(), before)
        return out

    assert all(torch.equal(a, b) for a, b in zip(run(1), run(2), strict=True))


# ------------------------------------------------------------------------------------------------------------
# Digits and synthetic


@pytest.mark.numerical
def test_the_digits_split_is_fixed_balanced_and_disjoint():
    data, other = load_data(Config()), load_data(Config(seed=9, augment=False))
    assert (data.train_size, data.test_size, data.num_classes, data.img_size) == (1437, 360, 10, 32)
    assert torch.equal(data.test.labels.bincount(), torch.full((10,), 36))
    assert torch.equal(data.test.images, other.test.images)
    assert torch.equal(data.train.images, other.train.images)
    train, test = ({image.numpy().tobytes() for image in source.images} for source in (data.train, data.test))
    assert not train & test
    split = md5(data.test.images.numpy().tobytes() + data.test.labels.numpy().tobytes()).hexdigest()
    assert split == GOLDEN_DIGITS


def test_digits_are_never_mirrored():
    """A mirrored 3 is no 3: every augmented image is a shift of its original, black at the border."""
    data = load_data(Config())
    samples = np.arange(64)
    images = data.train.images[samples]
    got = data.augment(images, 0, torch.from_numpy(samples))
    tops, lefts, flips = crop_and_flip(0, 0, samples, 4)
    assert flips.any()
    padded = torch.nn.functional.pad(images, (4, 4, 4, 4))
    for k in range(64):
        assert torch.equal(got[k], padded[k, :, tops[k] : tops[k] + 32, lefts[k] : lefts[k] + 32])


@pytest.mark.numerical
def test_synthetic_is_learnable_and_the_same_everywhere():
    data = load_data(Config(dataset="synthetic", num_classes=7))
    assert (data.train_size, data.test_size, data.num_classes) == (2048, 512, 7)
    assert md5(data.test.images.numpy().tobytes()).hexdigest() == GOLDEN_SYNTHETIC
    x, y = data.train.images.float().flatten(1), data.train.labels
    means = torch.stack([x[y == label].mean(0) for label in range(7)])
    nearest = torch.cdist(data.test.images.float().flatten(1), means).argmin(1)
    assert (nearest == data.test.labels).float().mean() > 0.95
    assert not torch.equal(data.train.images[:512], data.test.images)


@pytest.mark.parametrize("size", [1, 8, 17, 96])
def test_other_image_sizes(size):
    for name in ("digits", "synthetic"):
        data = load_data(Config(dataset=name, img_size=size))
        ((images, _),) = batches(data, [(0, np.arange(3))])
        assert images.shape == (3, 3, size, size) and images.isfinite().all()


def test_empty_and_single_batches():
    data = load_data(Config())
    nothing = np.arange(0)
    assert data.train_images(nothing, **PLAIN).shape == (0, 3, 32, 32)
    ((images, labels),) = data.test_batches([nothing], **PLAIN)
    assert images.shape == (0, 3, 32, 32) and labels.shape == (0,)
    assert list(data.test_batches([], **PLAIN)) == []


def test_the_classifier_has_at_least_the_classes_of_the_data():
    assert load_data(Config(num_classes=12)).num_classes == 12
    with pytest.raises(UserError, match="--num_classes 9 is too few: digits has 10 classes"):
        load_data(Config(num_classes=9))


# ------------------------------------------------------------------------------------------------------------
# Where they are kept


def test_decoded_images_wait_on_the_device_where_they_fit(folder):
    data, device = load_data(Config()), torch.device("meta")  # the one other than a CPU that is always there
    size = data.train.nbytes + data.test.nbytes
    assert size == 1797 * (3 * 32 * 32 + 8) and size >> 20 == 5
    kept = data.placed(device, 6)
    assert {kept.train.images.device, kept.plain_train.labels.device, kept.test.images.device} == {device}
    assert (kept.on_gpu, data.on_gpu, kept.train_size) == (size, 0, 1437) and kept.trouble is data.trouble
    assert data.placed(device, 5) is data and data.placed(device, 0) is data  # too large
    assert data.placed(CPU, 6) is data
    streamed = load_data(Config(**folder, cache_mib=0))
    assert streamed.placed(device, 1024) is streamed and streamed.on_gpu == 0


# ------------------------------------------------------------------------------------------------------------
# Image folders


def picture(path: Path, value: int, size: tuple[int, int]) -> None:
    """A noisy image of about the given grey value."""
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(value).integers(0, 30, (size[1], size[0], 3))
    Image.fromarray((noise + value).astype(np.uint8)).save(path)


@pytest.fixture
def folder(tmp_path) -> dict[str, str]:
    """Options for a folder of 3 classes with 10 training and 2 test images each, of many sizes and kinds."""
    for label, name in enumerate(["ant", "bee", "cat"]):
        for k in range(12):
            part = "train" if k < 10 else "val"
            kind = "png" if k % 2 else "jpg"
            picture(tmp_path / part / name / f"{k:02}.{kind}", 60 * label + 4 * k, (40 + 9 * k, 90 - 4 * k))
    return {"dataset": "imagefolder", "data_dir": str(tmp_path)}


@pytest.mark.numerical
def test_folders_are_read_the_same_from_memory_and_by_loader_processes(folder):
    schedule = [(epoch, part) for epoch in range(2) for part in np.array_split(np.arange(29, -1, -1), 4)]
    for augment in (False, True):
        options = {**folder, "img_size": 32, "augment": augment}
        kept = load_data(Config(**options))
        streamed = [load_data(Config(**options, cache_mib=0, data_workers=n)) for n in (0, 2)]
        assert isinstance(kept.train, InMemory) and all(isinstance(d.train, OnDisk) for d in streamed)
        assert (kept.train_size, kept.test_size, kept.num_classes, kept.img_size) == (30, 6, 3, 32)
        for data in streamed:
            for (x, y), (x2, y2) in zip(batches(kept, schedule), batches(data, schedule), strict=True):
                assert torch.equal(x, x2) and torch.equal(y, y2)
            samples = np.array([5, 29, 0])
            assert torch.equal(kept.train_images(samples, **PLAIN), data.train_images(samples, **PLAIN))
            for (x, y), (x2, y2) in zip(
                *(d.test_batches([np.arange(4), np.array([5])], **PLAIN) for d in (kept, data)), strict=True
            ):
                assert torch.equal(x, x2) and torch.equal(y, y2)


def test_class_sorted_folders_are_mixed_by_the_order(folder):
    data = load_data(Config(**folder, img_size=16))
    assert data.train.labels.tolist() == [0] * 10 + [1] * 10 + [2] * 10
    order = Order(0, data.train_size, 2, 5)
    drawn = batches(data, (order.batch(step, worker) for step in range(3) for worker in range(2)))
    assert sorted(torch.cat([y for _, y in drawn]).tolist()) == data.train.labels.tolist()
    assert all(len(y.unique()) > 1 for _, y in drawn)


@pytest.mark.numerical
def test_large_images_match_torchvision(folder):
    data = load_data(Config(**folder, img_size=70, data_workers=0))
    usual = v2.Compose([v2.Resize(80), v2.CenterCrop(70), v2.PILToTensor()])
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[:, :, None, None]
    ((images, _),) = data.test_batches([np.arange(6)], **PLAIN)
    for image, path in zip(images, data.test.files.paths, strict=True):
        expected = usual(torchvision.datasets.folder.pil_loader(path))
        torch.testing.assert_close(image, (expected / 255 - mean) / std, rtol=0, atol=1e-5)
    assert torch.equal(data.train_images(np.arange(4), **PLAIN)[:, 0].isfinite(), torch.ones(4, 70, 70) == 1)


@pytest.mark.numerical
def test_large_images_are_augmented_by_sample_in_whatever_process(folder):
    options = {**folder, "img_size": 70, "seed": 3}
    samples = np.arange(12)
    ((reference, _),) = batches(load_data(Config(**options, data_workers=0)), [(1, samples)])
    for workers, parts in ((0, 5), (2, 3)):
        data = load_data(Config(**options, data_workers=workers))
        got = batches(data, [(1, part) for part in np.array_split(samples[::-1], parts)])
        assert torch.equal(torch.cat([x for x, _ in got]), reference.flip(0))
    with Image.open(data.train.files.paths[7]) as file:
        box, flip = resized_crop(3, 1, 7, *file.size)
        expected = v2.functional.pil_to_tensor(file.convert("RGB").crop(box).resize((70, 70), 2))
    expected = expected.flip(2) if flip else expected
    raw = next(data.train.stream([(1, np.array([7]))], CPU)).images[0]
    assert torch.equal(raw, expected)
    assert not torch.equal(batches(data, [(2, samples)])[0][0], reference)
    plain = load_data(Config(**options, augment=False, data_workers=0))
    assert torch.equal(batches(plain, [(2, samples)])[0][0], data.train_images(samples, **PLAIN))


def test_grey_and_transparent_images_become_rgb(tmp_path):
    for part in ("train", "val"):
        picture(tmp_path / part / "b" / "rgb.png", 100, (8, 8))
        picture(tmp_path / part / "a" / "rgb.png", 100, (8, 8))
        Image.new("L", (8, 8), 50).save(tmp_path / part / "a" / "grey.png")
        Image.new("RGBA", (8, 8), (1, 2, 3, 9)).save(tmp_path / part / "a" / "clear.png")
    data = load_data(Config(dataset="imagefolder", data_dir=str(tmp_path), img_size=8))
    assert data.train.images[1].unique().tolist() == [50]
    assert data.train.images[0, :, 0, 0].tolist() == [1, 2, 3]


def break_image(how: str, path: Path) -> None:
    content = path.read_bytes()
    if how == "truncated":
        path.write_bytes(content[: len(content) // 2])
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "text":
        path.write_text("not an image")
    else:
        path.unlink()


@pytest.mark.parametrize("how", ["truncated", "empty", "text", "missing"])
@pytest.mark.parametrize("name", ["ant/06.jpg", "bee/07.png"])
def test_an_unreadable_image_is_named_and_its_neighbour_stands_in(folder, name, how):
    path = Path(folder["data_dir"], "train", name)
    schedule = [(epoch, part) for epoch in (0, 1) for part in np.array_split(np.arange(30), 6)]
    bad = 6 if name.startswith("ant") else 17
    for size in (70, 16):
        sound = load_data(Config(**folder, img_size=size, data_workers=0, cache_mib=0, augment=False))
        x, y = (torch.cat(parts) for parts in zip(*batches(sound, schedule), strict=True))
        for row in (bad, bad + 30):
            x[row], y[row] = x[row + 1], y[row + 1]
        data = load_data(Config(**folder, img_size=size, data_workers=2, cache_mib=0, augment=False))
        content = path.read_bytes()
        break_image(how, path)
        x2, y2 = (torch.cat(parts) for parts in zip(*batches(data, schedule), strict=True))
        assert torch.equal(x, x2) and torch.equal(y, y2)
        ((of, said),) = data.trouble.take().unreadable.items()
        assert of == str(path) and said.startswith(f"cannot read the image {path}: ") and "\n" not in said
        assert data.trouble.take() == News()
        path.write_bytes(content)


def test_kept_in_memory_or_not_the_same_image_stands_in(folder):
    """Crops are those of the sample that is replaced. The last one's neighbour is the first."""
    root = Path(folder["data_dir"])
    bad = [root / "train" / name for name in ("ant/06.jpg", "bee/07.png", "cat/08.jpg", "cat/09.png")]
    for path in (*bad, root / "val" / "bee" / "11.png"):
        break_image("truncated", path)
    options = {**folder, "img_size": 16}
    with pytest.raises(DataError, match=f"^cannot read the image {bad[0]}: ") as caught:
        load_data(Config(**options))
    assert not isinstance(caught.value, UserError) and "\n" not in str(caught.value)
    schedule = [(epoch, np.arange(30)) for epoch in range(3)]
    kept = load_data(Config(**options, on_bad_image="skip"))
    noted = kept.trouble.take().unreadable
    assert sorted(noted) == sorted([*map(str, bad), str(root / "val" / "bee" / "11.png")])
    for how in ("stop", "skip"):
        data = load_data(Config(**options, on_bad_image=how, cache_mib=0, data_workers=0))
        for (x, y), (x2, y2) in zip(batches(kept, schedule), batches(data, schedule), strict=True):
            assert torch.equal(x, x2) and torch.equal(y, y2)
        assert y.tolist()[-2:] == [0, 0] and y.tolist()[6] == 0 and y.tolist()[17] == 1
        ((x, y),), ((x2, y2),) = (d.test_batches([np.arange(6)], **PLAIN) for d in (kept, data))
        assert torch.equal(x, x2) and y.tolist() == y2.tolist() == [0, 0, 1, 2, 2, 2]
        assert data.trouble.take().unreadable == noted


def test_where_no_neighbour_can_be_read_it_is_an_error(folder):
    data = load_data(Config(**folder, img_size=70, data_workers=2))
    for path in Path(folder["data_dir"], "train").rglob("*.*"):
        path.unlink()
    with pytest.raises(DataError, match=r"ant/00.jpg: .*No such file.*, and nor can the images after it$"):
        batches(data, [(0, np.arange(4))])


def test_a_class_of_which_nothing_can_be_read_is_an_error(folder):
    for path in Path(folder["data_dir"], "train", "bee").rglob("*.*"):
        path.write_text("junk")
    with pytest.raises(DataError, match=r"^not one image can be read of the class of .*/train/bee/"):
        load_data(Config(**folder, img_size=8, on_bad_image="skip"))


def test_loader_processes_work_once_torch_distributed_is_up_and_end_with_their_iterator(folder, tmp_path):
    """Forked ones would inherit gloo's locks and can hang; and one that is left over keeps a job alive."""
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        torch.distributed.all_reduce(torch.ones(10))
        data = load_data(Config(**folder, img_size=70, data_workers=2))
        found = data.train_batches(((0, np.arange(4)) for _ in range(10**9)), **PLAIN)
        next(found), next(found)
        torch.distributed.all_reduce(torch.ones(10))
        processes = active_children()
        assert processes and not any(type(p).__name__ == "ForkProcess" for p in processes)
        del found
        deadline = time.monotonic() + 10
        while any(p.is_alive() for p in processes) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not any(p.is_alive() for p in processes)
    finally:
        torch.distributed.destroy_process_group()


def remove(path: Path) -> None:
    for child in path.iterdir():
        remove(child) if child.is_dir() else child.unlink()
    path.rmdir()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda root: remove(root), "no such folder"),
        (lambda root: remove(root / "train"), "has no train folder: it must hold train/ and val/"),
        (lambda root: remove(root / "val"), "has no val folder: it must hold"),
        (lambda root: remove(root / "val" / "bee"), "val lacks class folders that .*train has: bee$"),
        (lambda root: remove(root / "train" / "ant"), "train lacks class folders that .*val has: ant$"),
        (lambda root: [p.unlink() for p in (root / "train" / "cat").iterdir()], "without images: cat$"),
        (lambda root: [(root / "val" / f"n{k}").mkdir() for k in range(5)], "images: n0, n1, n2 and 2 more$"),
        (lambda root: [remove(p) for p in (root / "val").iterdir()], "val cannot be used: .*class folder"),
        (lambda root: (remove(root / "val"), (root / "val").write_text("")), "has no val folder"),
    ],
)  # fmt: skip
def test_missing_and_half_present_folders_are_the_users_error(folder, damage, message):
    damage(Path(folder["data_dir"]))
    with pytest.raises(UserError, match=message) as caught:
        load_data(Config(**folder))
    assert "\n" not in str(caught.value) and folder["data_dir"] in str(caught.value)


def test_imagenet_defaults_to_224(folder):
    data = load_data(Config(dataset="imagenet", data_dir=folder["data_dir"], data_workers=0))
    assert batches(data, [(0, np.arange(2))])[0][0].shape == (2, 3, 224, 224)
    with pytest.raises(UserError, match="--num_classes 2 is too few: imagenet has 3 classes"):
        load_data(Config(dataset="imagenet", data_dir=folder["data_dir"], num_classes=2))


# ------------------------------------------------------------------------------------------------------------
# CIFAR


@pytest.fixture
def cifar(tmp_path, monkeypatch) -> Config:
    """A CIFAR-10 of 20 + 4 images in the real layout, whose checksums torchvision is told."""
    dataset = torchvision.datasets.CIFAR10
    here = tmp_path / dataset.base_folder
    here.mkdir()
    rng = np.random.default_rng(0)

    def write(name: str, content: dict) -> list[str]:
        (here / name).write_bytes(pickle.dumps(content, protocol=2))
        return [name, md5((here / name).read_bytes()).hexdigest()]

    def images(labels: list[int]) -> dict:
        return {"data": rng.integers(0, 256, (len(labels), 3072), np.uint8), "labels": labels}

    train = [write(f"data_batch_{k}", images(list(range(10)))) for k in (1, 2)]
    test = [write("test_batch", images([3, 1, 4, 1]))]
    name, checksum = write("batches.meta", {"label_names": list("abcdefghij")})
    monkeypatch.setattr(dataset, "train_list", train)
    monkeypatch.setattr(dataset, "test_list", test)
    monkeypatch.setattr(dataset, "meta", {"filename": name, "key": "label_names", "md5": checksum})
    return Config(dataset="cifar10", data_dir=str(tmp_path), augment=False)


@pytest.mark.numerical
def test_cifar_is_read_from_its_folder(cifar):
    data = load_data(cifar)
    assert (data.train_size, data.test_size, data.num_classes, data.img_size) == (20, 4, 10, 32)
    with (Path(cifar.data_dir) / "cifar-10-batches-py" / "data_batch_2").open("rb") as file:
        raw = pickle.load(file)["data"][3].reshape(3, 32, 32)
    ((images, labels),) = batches(data, [(0, np.array([13]))], dtype=torch.float64)
    mean = np.array([0.4914, 0.4822, 0.4465])[:, None, None]
    std = np.array([0.2470, 0.2435, 0.2616])[:, None, None]
    np.testing.assert_allclose(images[0], (raw / 255 - mean) / std, rtol=1e-12)
    assert labels.tolist() == [3] and data.test.labels.tolist() == [3, 1, 4, 1]
    assert load_data(Config(**{**cifar.to_dict(), "img_size": 48})).train.images.shape == (20, 3, 48, 48)


@pytest.mark.parametrize("file", ["data_batch_1", "test_batch", "batches.meta"])
@pytest.mark.parametrize("how", ["truncated", "missing"])
def test_a_damaged_cifar_is_one_line(cifar, file, how):
    break_image(how, Path(cifar.data_dir) / "cifar-10-batches-py" / file)
    with pytest.raises(
        UserError, match="cifar-10-batches-py is incomplete or damaged: type --download"
    ) as caught:
        load_data(cifar)
    assert "\n" not in str(caught.value)


def test_only_download_touches_the_network_and_only_when_asked(tmp_path, monkeypatch):
    asked = []

    def fetch(url, *args, **kwargs):
        asked.append(url)
        raise URLError("no route to host")

    monkeypatch.setattr(torchvision.datasets.cifar, "download_and_extract_archive", fetch)
    without = Config(dataset="cifar100", data_dir=str(tmp_path))
    download(without)
    download(Config())
    allowed = Config(dataset="cifar100", data_dir=str(tmp_path), download=True)
    for config in (without, allowed):  # even with --download, loading itself fetches nothing
        with pytest.raises(UserError, match=f"cifar100 is not in {tmp_path}.*type --download"):
            load_data(config)
    (tmp_path / "cifar-100-python").mkdir()
    with pytest.raises(UserError, match="incomplete or damaged"):
        load_data(allowed)
    assert not asked
    with pytest.raises(RunError, match=r"could not download cifar100 into .*no route to host") as caught:
        download(allowed)
    assert len(asked) == 1 and not isinstance(caught.value, UserError)


def test_download_leaves_a_complete_set_alone(cifar, monkeypatch):
    monkeypatch.setattr(torchvision.datasets.cifar, "download_and_extract_archive", lambda *_, **__: 1 / 0)
    download(Config(**{**cifar.to_dict(), "download": True}))


# Written down from the first version; a change of any of them changes every run.
GOLDEN_HASH = [[16274927443929253252, 7762919274985453047]]
GOLDEN_BATCHES = [[15, 16, 2], [8, 12, 17], [1, 2, 4]]
GOLDEN_CROPS = [[4, 8, 2, 7, 2], [0, 6, 2, 6, 7], [True, False, True, True, True]]
GOLDEN_BOX = ((106, 59, 439, 360), False)
GOLDEN_DIGITS = "4be0b1659e6ecf760987eb2052cb308d"
GOLDEN_SYNTHETIC = "9c15fae817673d23986e60206abd5150"


def test_server_of_loader_processes_leaves_sigterm_to_the_rank() -> None:
    code = (
        "import os, signal, time\n"
        "from resist_ds.data.loader import _Context\n"
        "from multiprocessing.forkserver import _forkserver as server\n"
        "_Context()\n"
        "server.ensure_running()\n"
        "time.sleep(1)\n"
        "while b'SigIgn' and not int(open(f'/proc/{server._forkserver_pid}/status')"
        ".read().split('SigIgn:')[1].split()[0], 16) >> signal.SIGTERM - 1 & 1:\n"
        "    time.sleep(0.1)\n"
    ).replace("b'SigIgn' and ", "")
    subprocess.run([sys.executable, "-c", code], timeout=30, check=True)
