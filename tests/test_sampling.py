"""Order, shares, batches and crop windows against pure Python, brute force and torchvision."""

import math
import re
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torchvision.transforms import RandomCrop, RandomResizedCrop

from imagenet_swa.data.sampling import (
    NUM_TRIES,
    CropDraws,
    Indices,
    crop_windows,
    draw_crops,
    epoch_order,
    evaluation_batches,
    padded_crops,
    room_for_crops,
    split_global_batch,
    statistics_batches,
    training_batches,
    uniforms,
)

AREA, ASPECT = (0.08, 1.0), (3 / 4, 4 / 3)
MASK = 2**64 - 1
SEEDS = st.integers(0, 2**63 - 1)
EPOCHS = st.integers(0, 1000)


# ---------------------------------------------------------------------------------------------------------- order


def philox_words(num: int, key: tuple[int, int]) -> list[int]:
    """Philox4x64-10 (Salmon et al. 2011, Random123) in Python integers; the counter's first value is 1, as in numpy."""
    words: list[int] = []
    for counter in range(1, -(-num // 4) + 1):
        a, b, c, d = counter, 0, 0, 0
        k0, k1 = key
        for _ in range(10):
            high_a, low_a = divmod(a * 0xD2E7470EE14C6C93, 2**64)
            high_c, low_c = divmod(c * 0xCA5A826395121157, 2**64)
            a, b, c, d = high_c ^ b ^ k0, low_c, high_a ^ d ^ k1, low_a
            k0, k1 = (k0 + 0x9E3779B97F4A7C15) & MASK, (k1 + 0xBB67AE8584CAA73B) & MASK
        words += [a, b, c, d]
    return words[:num]


@settings(deadline=None)
@given(num_images=st.integers(0, 300), seed=SEEDS, epoch=EPOCHS)
def test_epoch_order_is_a_permutation(num_images: int, seed: int, epoch: int):
    """Every image comes exactly once in an epoch."""
    order = epoch_order(num_images, seed=seed, epoch=epoch)
    assert order.dtype == np.int64
    assert sorted(order.tolist()) == list(range(num_images))


@pytest.mark.parametrize(("seed", "epoch"), [(0, 0), (2**63 - 1, 9), (7, 3)])
def test_epoch_order_sorts_philox_words(seed: int, epoch: int):
    """The order is that of the Philox words keyed by (seed, epoch), whatever the version of numpy."""
    words = philox_words(101, (seed, epoch))
    assert epoch_order(101, seed=seed, epoch=epoch).tolist() == sorted(range(101), key=words.__getitem__)


def test_seeds_and_epochs_have_their_own_orders():
    """Three seeds and three epochs give nine orders, none like another."""
    orders = [epoch_order(1000, seed=seed, epoch=epoch) for seed, epoch in product(range(3), range(3))]
    for i, one in enumerate(orders):
        for other in orders[:i]:
            assert np.mean(one == other) < 0.02  # two unrelated orders of N agree in 1 place on average
            assert abs(np.corrcoef(one, other)[0, 1]) < 0.2


# ------------------------------------------------------------------------------------- shares of the global batch


def global_batches(num_images: int, global_batch_size: int, world_size: int, batch_size: int, first_step: int = 0) -> Indices:
    """(steps, global_batch_size): what all ranks together take at each step, ranks side by side."""
    shares = [
        training_batches(
            num_images,
            seed=3,
            epoch=2,
            global_batch_size=global_batch_size,
            batch_size_per_device=batch_size,
            rank=rank,
            world_size=world_size,
            first_step=first_step,
        )
        for rank in range(world_size)
    ]
    return np.concatenate([share.reshape(len(share), global_batch_size // world_size) for share in shares], axis=1)


@settings(deadline=None)
@given(
    world_size=st.sampled_from([1, 2, 4]),
    num_accumulation=st.integers(1, 4),
    batch_size=st.integers(1, 5),
    num_steps=st.integers(1, 5),
    left_over=st.integers(0, 100),
)
def test_global_batches_do_not_depend_on_the_world_size(
    world_size: int, num_accumulation: int, batch_size: int, num_steps: int, left_over: int
):
    """Step k takes order[kG : (k+1)G], in that order over the ranks, for any processes and accumulation; the rest sits out."""
    global_batch_size = world_size * num_accumulation * batch_size
    num_images = num_steps * global_batch_size + left_over % global_batch_size
    found = global_batches(num_images, global_batch_size, world_size, batch_size)
    order = epoch_order(num_images, seed=3, epoch=2)
    for step in range(num_steps):
        assert found[step].tolist() == order[step * global_batch_size : (step + 1) * global_batch_size].tolist()
    assert len(found) == num_steps


def test_shape_of_a_share():
    """A process's share of a step is (num_accumulation, batch_size_per_device), contiguous in memory."""
    sizes = {"global_batch_size": 24, "batch_size_per_device": 3, "rank": 1, "world_size": 2}
    share = training_batches(100, seed=0, epoch=0, **sizes)
    assert share.shape == (4, 4, 3)
    assert share.flags.c_contiguous


@pytest.mark.parametrize(("num_nodes", "processes_per_node"), [(2, 2), (1, 4), (4, 1), (3, 2)])
def test_nodes_and_processes_read_disjoint_complete_shares(num_nodes: int, processes_per_node: int):
    """Ranks numbered over all nodes read every image of the epoch's whole batches once, none twice."""
    world_size = num_nodes * processes_per_node
    shares = []
    for node, local_rank in product(range(num_nodes), range(processes_per_node)):
        rank = node * processes_per_node + local_rank
        sizes = {"global_batch_size": 2 * world_size, "batch_size_per_device": 1, "rank": rank, "world_size": world_size}
        shares.append(training_batches(10 * world_size, seed=0, epoch=0, **sizes).ravel())
    assert sorted(np.concatenate(shares).tolist()) == list(range(10 * world_size))


def test_images_left_over_change_from_epoch_to_epoch():
    """The images that an epoch leaves out are others in the next epochs."""
    left_out = []
    for epoch in range(3):
        taken = training_batches(100, seed=0, epoch=epoch, global_batch_size=32, batch_size_per_device=32)
        left_out.append(frozenset(range(100)) - set(taken.ravel().tolist()))
    assert [len(images) for images in left_out] == [4, 4, 4]
    assert len(set(left_out)) == 3


@pytest.mark.parametrize("first_step", range(6))
def test_epoch_resumes_at_any_step(first_step: int):
    """From step k on, the batches are those of the uninterrupted epoch, also with another number of processes."""
    whole = global_batches(67, 12, world_size=1, batch_size=12)
    resumed = global_batches(67, 12, world_size=2, batch_size=3, first_step=first_step)
    assert resumed.tolist() == whole[first_step:].tolist()


@settings(deadline=None)
@given(share=st.integers(1, 400), world_size=st.integers(1, 12), maximum=st.integers(1, 500))
def test_split_is_the_largest_equal_part(share: int, world_size: int, maximum: int):
    """Batch times accumulation times processes is the global batch, and no larger allowed batch divides the share."""
    global_batch_size = share * world_size
    batch_size, num_accumulation = split_global_batch(global_batch_size, world_size=world_size, max_batch_size_per_device=maximum)
    assert batch_size * num_accumulation * world_size == global_batch_size
    assert 1 <= batch_size <= maximum
    assert not any(share % larger == 0 for larger in range(batch_size + 1, min(maximum, share) + 1))


@settings(deadline=None)
@given(global_batch_size=st.integers(1, 600), world_size=st.integers(2, 64))
@example(global_batch_size=8, world_size=16)
def test_indivisible_batch_is_refused_with_sizes_and_counts_that_work(global_batch_size: int, world_size: int):
    """The message names the nearest sizes that these processes can share, and only numbers of processes that share this size."""
    assume(global_batch_size % world_size != 0)
    with pytest.raises(ValueError, match=f"{global_batch_size} does not divide over {world_size} processes") as caught:
        split_global_batch(global_batch_size, world_size=world_size, max_batch_size_per_device=64)
    advice = re.search(r"set it to ([\d or]+), or start one of ([\d, ]+) processes", str(caught.value))
    assert advice is not None
    sizes = [int(size) for size in advice[1].split(" or ")]
    below = global_batch_size - global_batch_size % world_size
    assert sizes == [size for size in (below, below + world_size) if size > 0]
    for size in sizes:
        assert math.prod(split_global_batch(size, world_size=world_size, max_batch_size_per_device=64)) * world_size == size
    for count in map(int, advice[2].split(", ")):
        shares = split_global_batch(global_batch_size, world_size=count, max_batch_size_per_device=64)
        assert math.prod(shares) * count == global_batch_size


# ------------------------------------------------------------------------------------- evaluation and statistics


@settings(deadline=None)
@given(num_images=st.integers(0, 120), world_size=st.integers(1, 5), around=st.integers(-1, 3), batch_size=st.integers(1, 130))
def test_evaluation_sees_every_image_exactly_once(num_images: int, world_size: int, around: int, batch_size: int):
    """Over all ranks every image comes once, in full batches but for each rank's last, for batches about n and any other."""
    for size in {batch_size, max(1, num_images + around)}:
        seen = []
        for rank in range(world_size):
            batches = evaluation_batches(num_images, rank=rank, world_size=world_size, batch_size=size)
            assert all(len(batch) == size for batch in batches[:-1])
            assert all(1 <= len(batch) <= size for batch in batches)
            seen += [int(i) for batch in batches for i in batch]
        assert sorted(seen) == list(range(num_images))


@settings(deadline=None)
@given(
    num_images=st.integers(1, 150),
    world_size=st.integers(1, 5),
    batch_size=st.integers(1, 60),
    num_used=st.none() | st.integers(2, 200),
)
@example(num_images=101, world_size=1, batch_size=100, num_used=None)
def test_statistics_see_each_used_image_once_in_even_batches(
    num_images: int, world_size: int, batch_size: int, num_used: int | None
):
    """Over all ranks `num_used` images (all where there are no more) come once each; the batches of all ranks differ by one
    image at most, so that none is below half the batch size.
    """
    seen, all_sizes = [], []
    for rank in range(world_size):
        batches = statistics_batches(
            num_images, seed=1, epoch=4, rank=rank, world_size=world_size, batch_size=batch_size, num_used=num_used
        )
        all_sizes += [len(batch) for batch in batches]
        seen += [int(i) for batch in batches for i in batch]
    assert 0 < min(all_sizes) <= max(all_sizes) <= batch_size
    assert max(all_sizes) - min(all_sizes) <= 1
    assert min(all_sizes) >= min(batch_size // 2, len(seen) // world_size)
    assert len(set(seen)) == len(seen) == min(num_images, num_used or num_images)
    assert set(seen) <= set(range(num_images))


def test_statistics_come_in_random_order():
    """Images sorted by class reach every batch in the proportions of the whole, and each epoch in another order."""
    labels = np.arange(4000) // 400  # ten classes, one after the other
    sizes = {"rank": 0, "world_size": 2, "batch_size": 500}
    first, second = (np.stack(statistics_batches(4000, seed=0, epoch=epoch, **sizes)) for epoch in (0, 1))
    for batch in first:
        counts = np.bincount(labels[batch], minlength=10)
        assert ((counts - 50) ** 2 / 50).sum() < 27.9  # chi-squared, 9 degrees of freedom, p = 0.001
    assert not np.array_equal(first, second)


def test_used_part_is_a_random_sample():
    """With `num_used` the images come from the whole set, not from its beginning."""
    (used,) = statistics_batches(10_000, seed=0, epoch=0, rank=0, world_size=1, batch_size=500, num_used=500)
    assert abs(used.mean() - 5000) < 5 * 10_000 / math.sqrt(12 * 500)


# --------------------------------------------------------------------------------------------------- random numbers


def split_mix(word: int) -> int:
    """SplitMix64's output for a state, in Python integers."""
    word = (word ^ (word >> 30)) * 0xBF58476D1CE4E5B9 & MASK
    word = (word ^ (word >> 27)) * 0x94D049BB133111EB & MASK
    return word ^ (word >> 31)


GOLDEN = 0x9E3779B97F4A7C15


def test_uniforms_are_split_mix_streams():
    """Image i of (seed, epoch) draws the SplitMix64 stream whose start is the hash of the three, with 53 bits a number.

    The hash itself is checked with the published first outputs for the state 1234567.
    """
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431, 16408922859458223821]
    assert [split_mix((1234567 + k * GOLDEN) & MASK) for k in range(1, 6)] == published

    seed, epoch, images = 2**63 - 1, 9, [0, 1, 1_281_166]
    found = uniforms(np.array(images), seed=seed, epoch=epoch, num=4)
    key = split_mix((seed + GOLDEN) & MASK)
    key = split_mix(key ^ (epoch + GOLDEN))
    for row, image in zip(found, images, strict=True):
        start = split_mix(key ^ (image + GOLDEN))
        words = [split_mix((start + k * GOLDEN) & MASK) for k in range(1, 5)]
        assert row.tolist() == [(word >> 11) / 2**53 for word in words]


@settings(deadline=None)
@given(
    images=st.lists(st.integers(0, 2**40), min_size=1, max_size=20),
    seed=SEEDS,
    epoch=EPOCHS,
    data=st.data(),
)
def test_an_image_draws_the_same_numbers_in_any_batch(images: list[int], seed: int, epoch: int, data: st.DataObject):
    """The numbers are in [0, 1) and depend on (seed, epoch, index) alone: not on the other images, their order or count."""
    together = uniforms(np.array(images), seed=seed, epoch=epoch, num=23)
    assert together.shape == (len(images), 23)
    assert (together >= 0).all()
    assert (together < 1).all()
    shuffled = data.draw(st.permutations(range(len(images))))
    again = uniforms(np.array(images)[shuffled], seed=seed, epoch=epoch, num=23)
    assert np.array_equal(again, together[shuffled])
    alone = uniforms(np.array(images[:1]), seed=seed, epoch=epoch, num=7)
    assert np.array_equal(alone[0], together[0, :7])


def test_every_seed_epoch_and_image_draws_its_own_numbers():
    """100 images in 5 epochs of 5 seeds draw 23 numbers each, all different."""
    drawn = [uniforms(np.arange(100), seed=seed, epoch=epoch, num=23) for seed, epoch in product(range(5), range(5))]
    assert len(np.unique(np.stack(drawn))) == 25 * 100 * 23


def correlations(one: NDArray[np.float64], other: NDArray[np.float64]) -> NDArray[np.float64]:
    """Correlation coefficient of each column of one with each of the other."""
    standard_one, standard_other = ((x - x.mean(axis=0)) / x.std(axis=0) for x in (one, other))
    return standard_one.T @ standard_other / len(one)


def test_uniforms_are_uniform_and_independent():
    """Mean, variance and histogram are those of the uniform distribution; positions, neighbouring images, epochs and seeds do
    not correlate, all within 5 standard errors.
    """
    num = 20_000
    here, next_epoch, next_seed = (
        uniforms(np.arange(num), seed=seed, epoch=epoch, num=23) for seed, epoch in ((0, 0), (0, 1), (1, 0))
    )
    assert np.abs(here.mean(axis=0) - 1 / 2).max() < 5 * math.sqrt(1 / 12 / num)
    assert np.abs(here.var(axis=0) - 1 / 12).max() < 5 * math.sqrt(1 / 180 / num)
    counts = np.histogram(here, bins=64, range=(0, 1))[0]
    expected = here.size / 64
    assert ((counts - expected) ** 2 / expected).sum() < 63 + 5 * math.sqrt(2 * 63)
    bound = 5 / math.sqrt(num)
    assert np.abs(correlations(here, here) - np.eye(23)).max() < bound
    for other in (np.roll(here, 1, axis=0), np.roll(here, 2, axis=0), next_epoch, next_seed):
        assert np.abs(correlations(here, other)).max() < bound


# ------------------------------------------------------------------------------------------------- crops and flips


def torchvision_window(
    u: list[float], height: int, width: int, area: tuple[float, float], aspect: tuple[float, float]
) -> tuple[int, int, int, int]:
    """RandomResizedCrop.get_params as torchvision writes it, with its random numbers taken from u."""
    place = u[2 * NUM_TRIES :]
    for k in range(10):
        target_area = height * width * (area[0] + (area[1] - area[0]) * u[k])
        log_low, log_high = math.log(aspect[0]), math.log(aspect[1])
        aspect_ratio = math.exp(log_low + (log_high - log_low) * u[NUM_TRIES + k])
        w = round(math.sqrt(target_area * aspect_ratio))
        h = round(math.sqrt(target_area / aspect_ratio))
        if 0 < w <= width and 0 < h <= height:
            return int(place[0] * (height - h + 1)), int(place[1] * (width - w + 1)), h, w
    ratio = width / height
    if ratio < aspect[0]:
        w, h = width, max(1, round(width / aspect[0]))
    elif ratio > aspect[1]:
        w, h = max(1, round(height * aspect[1])), height
    else:
        w, h = width, height
    return (height - h) // 2, (width - w) // 2, h, w


def windows_of(sizes: list[tuple[int, int]], seed: int, area: tuple[float, float], aspect: tuple[float, float]) -> Indices:
    draws = draw_crops(np.arange(len(sizes)), seed=seed, epoch=1, area=area, aspect=aspect, horizontal_flip=True)
    heights, widths = np.array(sizes).T
    return crop_windows(draws, heights, widths, aspect=aspect)


SIDES = st.integers(1, 30) | st.integers(1, 5000)
RANGES = st.sampled_from([(AREA, ASPECT), ((0.25, 1.0), ASPECT), ((0.95, 1.0), (1 / 2, 2.0)), ((0.1, 0.5), (3.0, 4.0))])


@settings(deadline=None, max_examples=200)
@given(sizes=st.lists(st.tuples(SIDES, SIDES), min_size=1, max_size=30), seed=SEEDS, ranges=RANGES)
@example(sizes=[(1, 1), (1, 5000), (5000, 1), (2, 3), (10_000, 10_000)], seed=0, ranges=(AREA, ASPECT))
@example(sizes=[(1, 1), (1, 2), (2, 1)] * 100, seed=0, ranges=(AREA, ASPECT))
@example(sizes=[(1, 1), (9, 1)], seed=0, ranges=((0.1, 0.5), (3.0, 4.0)))
def test_windows_are_those_of_torchvisions_loop(
    sizes: list[tuple[int, int]], seed: int, ranges: tuple[tuple[float, float], tuple[float, float]]
):
    """Fed the same numbers, ten tries and the central fallback find torchvision's window, inside images of any size."""
    area, aspect = ranges
    windows = windows_of(sizes, seed, area, aspect)
    u = uniforms(np.arange(len(sizes)), seed=seed, epoch=1, num=2 * NUM_TRIES + 3)
    for (height, width), window, numbers in zip(sizes, windows.tolist(), u.tolist(), strict=True):
        assert tuple(window) == torchvision_window(numbers, height, width, area, aspect)
        top, left, h, w = window
        assert h >= 1
        assert w >= 1
        assert 0 <= top <= height - h
        assert 0 <= left <= width - w


def test_some_windows_are_fallbacks_and_some_are_found():
    """A long image takes the central fallback of torchvision: the whole short side, the aspect ratio at its limit."""
    windows = windows_of([(100, 1000)] * 500, 0, (0.5, 1.0), ASPECT)
    assert (windows == [0, (1000 - 133) // 2, 100, 133]).all()
    found = windows_of([(375, 500)] * 500, 0, AREA, ASPECT)
    assert len(np.unique(found, axis=0)) > 490


@settings(deadline=None)
@given(height=SIDES, width=SIDES, place=st.sampled_from([0.0, 1 - 2.0**-53]), share=st.floats(0.01, 1))
def test_extreme_places_keep_the_window_inside(height: int, width: int, place: float, share: float):
    """The least and the largest number below 1 put the window on the image's very edges, not past them."""
    sides = np.full((1, NUM_TRIES), math.sqrt(share))
    draws = CropDraws(
        width_factor=sides, height_factor=sides, top=np.array([place]), left=np.array([place]), flip=np.array([False])
    )
    top, left, h, w = crop_windows(draws, np.array([height]), np.array([width]), aspect=ASPECT)[0].tolist()
    side = math.floor(math.sqrt(height * width) * math.sqrt(share) + 0.5)
    if 0 < side <= min(height, width):
        assert (h, w) == (side, side)
        assert (top, left) == ((0, 0) if place == 0 else (height - h, width - w))
    assert 0 <= top <= height - h
    assert 0 <= left <= width - w


@pytest.mark.parametrize(("height", "width"), [(375, 500), (64, 200)])
def test_windows_are_distributed_as_torchvisions(height: int, width: int):
    """Area share, log aspect ratio and centre, and their squares, have torchvision's means over 20,000 draws."""
    num = 20_000
    torch.manual_seed(0)
    image = torch.empty(1, height, width)
    theirs = np.array([RandomResizedCrop.get_params(image, list(AREA), list(ASPECT)) for _ in range(num)])
    ours = windows_of([(height, width)] * num, 0, AREA, ASPECT)

    def moments(windows: NDArray[np.int64]) -> NDArray[np.float64]:
        top, left, h, w = windows.T
        features = [h * w / (height * width), np.log(w / h), (top + h / 2) / height, (left + w / 2) / width]
        return np.stack([*features, *[feature**2 for feature in features]])

    one, other = moments(ours), moments(theirs)
    standard_error = np.sqrt((one.var(axis=1) + other.var(axis=1)) / num)
    assert (np.abs(one.mean(axis=1) - other.mean(axis=1)) < 4 * standard_error).all()


def test_half_of_the_images_are_mirrored():
    """Half of the images are mirrored, whatever their crop, and none where mirroring is off."""
    arguments = {"seed": 0, "epoch": 0, "area": AREA, "aspect": ASPECT}
    mirrored = draw_crops(np.arange(20_000), **arguments, horizontal_flip=True)
    assert abs(mirrored.flip.mean() - 0.5) < 5 * 0.5 / math.sqrt(20_000)
    assert abs(np.corrcoef(mirrored.flip, mirrored.left)[0, 1]) < 5 / math.sqrt(20_000)
    plain = draw_crops(np.arange(20_000), **arguments, horizontal_flip=False)
    assert not plain.flip.any()
    assert np.array_equal(plain.top, mirrored.top)


# ---------------------------------------------------------------------------------------------------- padded crops


def places_of(num: int, height: int, width: int, *, padding: int, image_size: int) -> Indices:
    draws = draw_crops(np.arange(num), seed=4, epoch=2, area=AREA, aspect=ASPECT, horizontal_flip=True)
    return padded_crops(draws, np.full(num, height), np.full(num, width), padding=padding, image_size=image_size)


@settings(deadline=None)
@given(
    height=SIDES,
    width=SIDES,
    padding=st.integers(0, 50),
    image_size=st.integers(1, 300),
    places=st.tuples(*[st.sampled_from([0.0, 1 - 2.0**-53]) | st.floats(0, 1, exclude_max=True)] * 2),
)
def test_padded_crops_lie_within_the_border(height: int, width: int, padding: int, image_size: int, places: tuple[float, float]):
    """Whatever is drawn, a window begins no further out than the border does, and ends no further; the least and the largest
    number below 1 put it at the border's two ends.
    """
    assume(min(height, width) + 2 * padding >= image_size)
    top, left = (np.array([place]) for place in places)
    draws = CropDraws(width_factor=np.ones((1, 10)), height_factor=np.ones((1, 10)), top=top, left=left, flip=np.array([True]))
    found = padded_crops(draws, np.array([height]), np.array([width]), padding=padding, image_size=image_size)
    assert found.shape == (1, 2) and found.dtype == np.int64
    for start, side, place in zip(found[0].tolist(), (height, width), places, strict=True):
        last = side + padding - image_size
        assert -padding <= start <= last
        if place in (0.0, 1 - 2.0**-53):
            assert start == (-padding if place == 0 else last)


def test_padded_crops_are_distributed_as_torchvisions():
    """Each of the 9 x 9 places is as likely as it is in torchvision's RandomCrop: by chi square, ours and its are uniform."""
    num = 40_500
    torch.manual_seed(0)
    larger = torch.empty(3, 40, 40)
    theirs = np.array([RandomCrop.get_params(larger, (32, 32))[:2] for _ in range(num)]) - 4
    for found in (places_of(num, 32, 32, padding=4, image_size=32), theirs):
        counts = np.zeros((9, 9))
        np.add.at(counts, tuple(found.T + 4), 1)
        expected = num / 81
        assert ((counts - expected) ** 2 / expected).sum() < 80 + 5 * math.sqrt(2 * 80)


def test_padded_crops_and_flips_are_independent():
    """Whether an image is mirrored says nothing about the place of its crop, nor its top about its left."""
    num = 20_000
    flips = draw_crops(np.arange(num), seed=4, epoch=2, area=AREA, aspect=ASPECT, horizontal_flip=True).flip
    top, left = places_of(num, 32, 32, padding=4, image_size=32).T
    for one, other in ((top, left), (top, flips), (left, flips)):
        assert abs(np.corrcoef(one, other)[0, 1]) < 5 / math.sqrt(num)


@pytest.mark.parametrize(("height", "width", "rooms"), [(32, 40, [8, 16]), (24, 23, [0, -1]), (1, 500, [-23, 476])])
def test_room_for_padded_crops(height: int, width: int, rooms: list[int]):
    """The room is what an image with its border has more than a window; where torchvision refuses to crop, it is negative."""
    assert room_for_crops(np.array([height]), np.array([width]), padding=4, image_size=32).tolist() == [rooms]
    crop = RandomCrop(32, padding=4)
    if min(rooms) >= 0:
        crop(torch.zeros(3, height, width))
    else:
        with pytest.raises(ValueError, match="larger"):
            crop(torch.zeros(3, height, width))
