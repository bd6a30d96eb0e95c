"""What of an image becomes a sample: as torchvision draws it, inside the image, and the same whenever it is asked."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import RandomResizedCrop

from dsaux.data.pictures import change_color
from dsaux.data.views import (
    CentralSquare,
    RandomResizedCropFlip,
    random_windows,
    shorter_side,
    uniform_numbers,
)

COUNT = 5000


def windows_of(height: int, width: int, *, count: int = COUNT) -> np.ndarray:
    keys = np.random.default_rng(0).integers(0, 2**64, size=count, dtype=np.uint64)
    return random_windows(keys, np.tile(np.array([[height, width]], dtype=np.int64), (count, 1)))


def reference_of(height: int, width: int, *, count: int = COUNT) -> np.ndarray:
    torch.manual_seed(0)
    image = Image.new("L", (width, height))
    draws = [RandomResizedCrop.get_params(image, [0.08, 1.0], [3 / 4, 4 / 3]) for _ in range(count)]
    return np.array(draws)


@pytest.mark.parametrize(("height", "width"), [(375, 500), (500, 375), (224, 224)])
def test_windows_have_the_distribution_of_torchvision(height: int, width: int) -> None:
    statistics = {
        "area": lambda w: w[:, 2] * w[:, 3] / (height * width),
        "log aspect": lambda w: np.log(w[:, 3] / w[:, 2]),
        "centre, down": lambda w: (w[:, 0] + w[:, 2] / 2) / height,
        "centre, across": lambda w: (w[:, 1] + w[:, 3] / 2) / width,
        "top edge": lambda w: w[:, 0] / height,
    }
    ours, theirs = windows_of(height, width), reference_of(height, width)
    for name, of in statistics.items():
        one, other = of(ours), of(theirs)
        # Five standard errors of a difference of two means, and the same for the standard deviations, whose standard
        # error is below that of a mean for these bounded quantities.
        tolerance = 5 * np.sqrt((one.var() + other.var()) / COUNT)
        assert abs(one.mean() - other.mean()) < tolerance, name
        assert abs(one.std() - other.std()) < tolerance, name


@pytest.mark.parametrize(("height", "width"), [(1, 1), (2, 3), (10, 1000), (1000, 10), (375, 500)])
def test_windows_lie_inside_the_image(height: int, width: int) -> None:
    top, left, high, wide = windows_of(height, width, count=500).T
    assert (top >= 0).all()
    assert (left >= 0).all()
    assert (high >= 1).all()
    assert (wide >= 1).all()
    assert (top + high <= height).all()
    assert (left + wide <= width).all()


@pytest.mark.parametrize(("height", "width"), [(10, 1000), (1000, 10)])
def test_an_image_that_no_window_fits_gets_the_central_one_of_torchvision(height: int, width: int) -> None:
    assert (windows_of(height, width, count=20) == reference_of(height, width, count=1)).all()


def test_a_window_depends_on_its_own_key_and_size_alone() -> None:
    keys = np.arange(8, dtype=np.uint64)
    sizes = np.array([[100 + 10 * i, 180 - 10 * i] for i in range(8)], dtype=np.int64)
    together = random_windows(keys, sizes)
    alone = [random_windows(keys[i : i + 1], sizes[i : i + 1])[0] for i in range(8)]
    assert (together == np.array(alone)).all()


def test_numbers_of_a_key_are_those_of_splitmix64() -> None:
    # The first outputs for the seed 1234567, as published with the generator's reference code in several languages.
    expected = np.array([6457827717110365317, 3203168211198807973, 9817491932198370423], dtype=np.uint64)
    found = uniform_numbers(np.array([1234567], dtype=np.uint64), 3)[0]
    assert (found == (expected >> np.uint64(11)) * 2.0**-53).all()


def test_half_of_the_images_are_flipped_and_colours_lie_in_their_range() -> None:
    draws = RandomResizedCropFlip(color=0.4).draw(np.random.default_rng(0), COUNT)
    assert abs(draws["flip"].mean() - 0.5) < 5 * 0.5 / np.sqrt(COUNT)  # five standard errors
    color = draws["color"]
    assert color.shape == (COUNT, 3)
    assert color.min() >= 0.6
    assert color.max() <= 1.4
    error = 0.8 / np.sqrt(12 * COUNT)  # of the mean of a uniform number
    assert (abs(color.mean(axis=0) - 1) < 5 * error).all()
    assert (abs(color.std(axis=0) - 0.8 / np.sqrt(12)) < 5 * error).all()
    assert (abs(np.corrcoef(color.T) - np.eye(3)) < 5 / np.sqrt(COUNT)).all()


def test_the_strength_of_colours_leaves_the_windows_and_flips_alone() -> None:
    plain = RandomResizedCropFlip().draw(np.random.default_rng(3), 50)
    jittered = RandomResizedCropFlip(color=2.0).draw(np.random.default_rng(3), 50)
    assert (plain["key"] == jittered["key"]).all()
    assert (plain["flip"] == jittered["flip"]).all()
    assert jittered["color"].min() >= 0


def test_colours_change_as_their_factors_say() -> None:
    pixels = np.array([[10, 100, 200], [128, 128, 128]], dtype=np.uint8)
    one = np.ones(3, dtype=np.float32)
    assert (change_color(pixels, one) == pixels).all()
    assert (change_color(pixels, one * [1.5, 1, 1]) == [[15, 150, 255], [192, 192, 192]]).all()
    assert (change_color(pixels, one * [1, 0.5, 1]) == [[69, 114, 164], [128, 128, 128]]).all()
    assert np.ptp(change_color(pixels, one * [1, 1, 0]), axis=1).tolist() == [0, 0]  # no saturation: grey


def test_the_central_square_is_that_of_torchvision() -> None:
    assert shorter_side(224) == 256
    sizes = np.array([[375, 500], [500, 333], [100, 100]], dtype=np.int64)
    views = CentralSquare().views({}, sizes, image_size=224)
    assert views.resized.tolist() == [[256, 341], [384, 256], [256, 256]]
    assert views.crop.tolist() == [[16, 58], [80, 16], [16, 16]]
    assert views.color is None
    assert not views.flip.any()
