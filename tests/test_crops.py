"""Padded crops of all loaders against torchvision's padding, and small images in evaluation."""

import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import index_names, preprocessing
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image
from small_loaders import compiled_loader, dali_loader, torchvision_loader
from torchvision.transforms import functional

from imagenet_swa.config import Preprocessing
from imagenet_swa.data import resize
from imagenet_swa.data.batch import BadImageError, BadImages, Batch, ImageLoader
from imagenet_swa.data.dali import DaliLoader
from imagenet_swa.data.index import ImageIndex
from imagenet_swa.data.sampling import NUM_TRIES, training_batches, uniforms

F: Any = functional  # annotated for tensors, also takes PIL images
# Height and width: CIFAR's, others, and some that are mostly border.
SIZES = ((32, 32), (32, 32), (33, 32), (40, 27), (27, 40), (64, 24), (24, 100), (200, 31), (90, 90))
NARROWEST = 24
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)


MakeLoader = Callable[..., ImageLoader]
COMPILED = pytest.param(
    compiled_loader,
    id="compiled",
    marks=pytest.mark.skipif(not resize.available(), reason="the compiled part was not built"),
)
every_loader = pytest.mark.parametrize(
    "make", [COMPILED, pytest.param(dali_loader, id="dali"), pytest.param(torchvision_loader, id="torchvision")]
)


def padded(padding: int = 4, **changes: Any) -> Preprocessing:
    return preprocessing(**{"train_crop": "padded", "padding": padding, "resize": 32} | changes)


def noise(height: int, width: int, seed: int = 0) -> NDArray[np.uint8]:
    """Without black pixels, so that a border is told from the image."""
    return np.random.default_rng([seed, height, width]).integers(1, 256, (height, width, 3)).astype(np.uint8)


def save_png(folder: Path, sizes: Iterable[tuple[int, int]]) -> ImageIndex:
    """PNG files of these heights and widths, in this order."""
    names = []
    for number, (height, width) in enumerate(sizes):
        names.append(f"{number:03d}.png")
        Image.fromarray(noise(height, width, number)).save(folder / names[-1])
    return index_names(folder, [os.fsencode(name) for name in names])


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> ImageIndex:
    """PNGs of many sizes."""
    return save_png(tmp_path_factory.mktemp("png"), SIZES)


@pytest.fixture(scope="module")
def cifar(tmp_path_factory: pytest.TempPathFactory) -> ImageIndex:
    """24 PNGs of CIFAR's size."""
    return save_png(tmp_path_factory.mktemp("cifar"), [(32, 32)] * 24)


def pixels(batches: Iterable[Batch]) -> NDArray[np.float64]:
    """(n, H, W, 3) of all batches together."""
    return np.concatenate([batch.images.permute(0, 2, 3, 1).cpu().numpy() for batch in batches]).astype(np.float64)


def torchvision_crop(index: ImageIndex, number: int, work: Preprocessing, *, seed: int, epoch: int) -> NDArray[np.uint8]:
    """torchvision's RandomCrop(image_size, padding) and RandomHorizontalFlip, fed the numbers that the loaders draw."""
    with Image.open(index.path(number)) as file:
        image = F.pad(file.convert("RGB"), [work.padding])
    numbers = uniforms(np.array([number]), seed=seed, epoch=epoch, num=2 * NUM_TRIES + 3)[0, 2 * NUM_TRIES :].tolist()
    size = work.image_size
    top, left = int(numbers[0] * (image.height - size + 1)), int(numbers[1] * (image.width - size + 1))
    image = F.crop(image, top, left, size, size)
    return np.asarray(F.hflip(image) if work.horizontal_flip and numbers[2] < 0.5 else image)


def check(index: ImageIndex, make: MakeLoader, work: Preprocessing, seed: int, epoch: int) -> None:
    batches = np.array_split(np.arange(len(index)), 3)
    got = pixels(make(index, work, seed=seed).training_stream(batches, epoch=epoch))
    for number, image in enumerate(got):
        wanted = torchvision_crop(index, number, work, seed=seed, epoch=epoch)
        np.testing.assert_allclose(image, wanted, rtol=0, atol=1e-3, err_msg=index.path(number))


# ------------------------------------------------------------------------------------------------- pixels in training


@every_loader
@settings(max_examples=12, deadline=None)
@given(
    seed=st.integers(0, 2**63 - 1),
    epoch=st.integers(0, 1000),
    padding=st.integers(4, 40),
    flip=st.booleans(),
    image_size=st.sampled_from([16, 31, 32]),
)
def test_padded_crops_are_torchvisions(
    index: ImageIndex, make: MakeLoader, seed: int, epoch: int, padding: int, flip: bool, image_size: int
) -> None:
    """A training image is the window that torchvision cuts from the image with black borders, to the last grey level."""
    check(index, make, padded(padding, image_size=image_size, horizontal_flip=flip), seed, epoch)


@every_loader
def test_padded_crops_without_a_border(index: ImageIndex, make: MakeLoader) -> None:
    """With a padding of nothing, windows stay inside the images."""
    work = padded(0, image_size=NARROWEST)
    check(index, make, work, seed=1, epoch=2)
    assert pixels(make(index, work).training_stream([np.arange(len(index))], epoch=0)).min() > 0.5


@every_loader
@pytest.mark.parametrize("kind", ["JPEG", "WEBP", "grey", "palette", "alpha"])
def test_padded_crops_of_other_files(tmp_path: Path, make: MakeLoader, kind: str) -> None:
    """Images are padded whatever kind of file they come from."""
    image = Image.fromarray(np.asarray(Image.fromarray(noise(6, 6)).resize((40, 36))))
    image = image.convert({"grey": "L", "palette": "P", "alpha": "RGBA"}.get(kind, "RGB"))
    image.save(tmp_path / "image", kind if kind in ("JPEG", "WEBP") else "PNG", quality=95, lossless=True)
    check(index_names(tmp_path, [b"image"]), make, padded(), seed=3, epoch=1)


@every_loader
def test_borders_are_black_before_the_normalisation(cifar: ImageIndex, make: MakeLoader) -> None:
    """Each value, a border's too, is (grey level / 255 - mean) / std of its channel."""
    work = padded(12, mean=MEAN, std=STD)
    got = pixels(make(cifar, work).training_stream([np.arange(24)], epoch=0))
    grey = np.stack([torchvision_crop(cifar, number, work, seed=0, epoch=0) for number in range(24)])
    assert (grey == 0).all(axis=-1).mean() > 0.2
    np.testing.assert_allclose(got, (grey / 255 - MEAN) / STD, rtol=0, atol=2e-6)


@every_loader
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_padded_crops_are_the_same_for_any_number_of_processes(cifar: ImageIndex, make: MakeLoader, world_size: int) -> None:
    """Ranks, threads, batches and the step from which a stream starts decide nothing about a single bit of the pixels."""

    def global_batches(world_size: int, batch_size: int, first_step: int = 0, **changes: Any) -> NDArray[np.float64]:
        parts = []
        for rank in range(world_size):
            mine = training_batches(
                24,
                seed=7,
                epoch=3,
                global_batch_size=8,
                batch_size_per_device=batch_size,
                rank=rank,
                world_size=world_size,
                first_step=first_step,
            )
            shown = pixels(make(cifar, padded(), seed=7, **changes).training_stream(mine.reshape(-1, batch_size), epoch=3))
            parts.append(shown.reshape(3 - first_step, 8 // world_size, 32, 32, 3))
        return np.concatenate(parts, axis=1)

    whole = global_batches(1, 8)
    np.testing.assert_array_equal(global_batches(world_size, 2, num_threads=1, prefetch=1), whole)
    np.testing.assert_array_equal(global_batches(world_size, 2, first_step=1), whole[1:])


@every_loader
def test_seeds_and_epochs_show_other_padded_crops(cifar: ImageIndex, make: MakeLoader) -> None:
    """Nearly every image is shown elsewhere under another seed and in another epoch."""
    keys = ((0, 0), (1, 0), (0, 1))
    shows = [pixels(make(cifar, padded(), seed=seed).training_stream([np.arange(24)], epoch=epoch)) for seed, epoch in keys]
    for number, one in enumerate(shows):
        for other in shows[:number]:
            assert (np.abs(one - other).mean(axis=(1, 2, 3)) > 1).mean() > 0.8


# ------------------------------------------------------------------------------------------------- images too small


@every_loader
def test_an_image_too_small_for_its_crop_is_named(tmp_path: Path, make: MakeLoader) -> None:
    """An image that its border does not make as large as a crop stops the run, with its name, its size and the settings."""
    index = save_png(tmp_path, [(32, 32), (23, 32)])
    with pytest.raises(BadImageError, match=r"001\.png: too small .* 23 x 32 pixels and 4 of border .* 32 x 32") as error:
        list(make(index, padded()).training_stream([np.arange(2)], epoch=0))
    assert "preprocessing.padding" in str(error.value)


@every_loader
def test_images_too_small_for_their_crop_are_left_out(tmp_path: Path, make: MakeLoader) -> None:
    """Too low and too narrow ones are left out, one that fits exactly is not, and the rest is as it would be alone."""
    index = save_png(tmp_path, [(23, 32), (24, 24), (32, 23), (32, 32), (1, 1), (24, 200)])
    sound = np.array([1, 3, 5])
    loader = make(index, padded(), bad_images=BadImages(index, "skip", 3))
    batches = list(loader.training_stream([np.arange(5), np.array([5, 3])], epoch=4))
    assert [batch.left_out for batch in batches] == [(0, 2, 4), ()]
    assert [batch.indices.tolist() for batch in batches] == [[1, 3], [5, 3]]
    alone = pixels(make(index, padded()).training_stream([sound], epoch=4))
    np.testing.assert_array_equal(pixels(batches), alone[[0, 1, 2, 1]])


# ------------------------------------------------------------------------------------------------------- evaluation


@every_loader
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_evaluation_of_images_of_the_right_size_changes_nothing(cifar: ImageIndex, make: MakeLoader, interpolation: str) -> None:
    """Images of image_size pixels, with a resize to the same, reach the network as they are in their files."""
    got = pixels(make(cifar, padded(interpolation=interpolation)).evaluation_stream(np.array_split(np.arange(24), 2)))
    wanted = np.stack([noise(32, 32, number) for number in range(24)])
    np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-3)


@every_loader
def test_evaluation_knows_nothing_of_the_training_crop(index: ImageIndex, tmp_path: Path, make: MakeLoader) -> None:
    """Evaluation shows the same bits whichever crop training takes, images that are too small for it among them."""
    for images in (index, save_png(tmp_path, [(20, 20), (9, 50)])):
        batches = np.array_split(np.arange(len(images)), 2)
        got, wanted = (
            list(make(images, work).evaluation_stream(batches)) for work in (padded(resize=40), preprocessing(resize=40))
        )
        assert [batch.left_out for batch in got] == [(), ()]
        np.testing.assert_array_equal(pixels(got), pixels(wanted))


# -------------------------------------------------------------------------------------------------------------- GPU


def gpu_loader(index: ImageIndex, work: Preprocessing, **changes: Any) -> DaliLoader:
    return dali_loader(index, work, **{"device": torch.device("cuda", 0), "decode_on_gpu": True} | changes)


def gpu_loader_decoding_on_the_cpu(index: ImageIndex, work: Preprocessing, **changes: Any) -> DaliLoader:
    return gpu_loader(index, work, decode_on_gpu=False, compiled_resize=resize.available(), **changes)


every_gpu_loader = pytest.mark.parametrize("make", [gpu_loader, gpu_loader_decoding_on_the_cpu])


@pytest.mark.gpu
@every_gpu_loader
@pytest.mark.parametrize("padding", [4, 13, 40])
def test_gpu_padded_crops_are_torchvisions(index: ImageIndex, make: MakeLoader, padding: int) -> None:
    """On a GPU too, wherever the images are decoded, the crops of PNGs are torchvision's to the last grey level."""
    for seed in range(3):
        check(index, make, padded(padding), seed, epoch=seed)


@pytest.mark.gpu
@every_gpu_loader
def test_gpu_borders_are_black_before_the_normalisation(cifar: ImageIndex, make: MakeLoader) -> None:
    """Each value on the GPU, a border's too, is (grey level / 255 - mean) / std of its channel."""
    test_borders_are_black_before_the_normalisation(cifar, make)


@pytest.mark.gpu
@every_gpu_loader
def test_gpu_leaves_out_images_too_small_for_their_crop(tmp_path: Path, make: MakeLoader) -> None:
    """Images too small are left out there as well."""
    test_images_too_small_for_their_crop_are_left_out(tmp_path, make)


@pytest.mark.gpu
@every_gpu_loader
def test_gpu_evaluation_of_images_of_the_right_size_changes_nothing(cifar: ImageIndex, make: MakeLoader) -> None:
    """A resize to the images' own size changes nothing on a GPU."""
    test_evaluation_of_images_of_the_right_size_changes_nothing(cifar, make, "bilinear")
