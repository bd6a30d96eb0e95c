"""The photographs: what is cut, always the same, nothing is fetched, what is said when one is missing."""

from __future__ import annotations

import importlib.util
import socket
import time

import numpy as np
import pytest

from dsaux.config import ConfigError, DataConfig
from dsaux.data import ImageDataset, check_dataset, load_dataset, photos


@pytest.fixture(scope="module")
def dataset() -> ImageDataset:
    return load_dataset(DataConfig(name="photos", train_samples=200, test_samples=90))


def test_images_have_the_promised_shapes_and_types(dataset):
    assert dataset.train_images.shape == (200, 32, 32, 3)
    assert dataset.test_images.shape == (90, 32, 32, 3)
    assert dataset.train_images.dtype == dataset.test_images.dtype == np.uint8
    assert dataset.train_labels.dtype == dataset.test_labels.dtype == np.int64
    assert dataset.num_classes == 18


def test_classes_are_balanced_up_to_one_image(dataset):
    assert set(np.bincount(dataset.train_labels, minlength=18)) == {11, 12}
    assert set(np.bincount(dataset.test_labels, minlength=18)) == {5}


def test_mean_and_std_are_those_of_the_training_images(dataset):
    pixels = dataset.train_images.reshape(-1, 3).astype(np.float64)
    assert dataset.mean == pytest.approx(pixels.mean(axis=0))
    assert dataset.std == pytest.approx(pixels.std(axis=0))


def test_two_loads_give_the_same_bytes(dataset):
    again = load_dataset(DataConfig(name="photos", train_samples=200, test_samples=90))
    assert np.array_equal(again.train_images, dataset.train_images)
    assert np.array_equal(again.test_images, dataset.test_images)


def test_test_images_do_not_depend_on_the_number_of_training_images(dataset):
    other = load_dataset(DataConfig(name="photos", train_samples=18, test_samples=90))
    assert np.array_equal(other.test_images, dataset.test_images)


def test_nothing_goes_over_the_network(monkeypatch):
    def refuse(*_args, **_kwargs):
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket, "socket", refuse)
    load_dataset(DataConfig(name="photos", train_samples=18, test_samples=18))


@pytest.mark.parametrize("image_size", [8, 16, 33, 64])
def test_every_class_fits_at_every_size(image_size):
    dataset = load_dataset(DataConfig(name="photos", image_size=image_size, train_samples=36, test_samples=36))
    assert dataset.train_images.shape[1:] == dataset.test_images.shape[1:] == (image_size, image_size, 3)


def test_no_crop_side_exceeds_the_smallest_region():
    sizes = [photos._read_rgb(path).size for path in photos.find_pictures()]
    assert min(width - -(-2 * width // 3) for width, _ in sizes) >= photos.LARGEST_SIDE
    assert min(height for _, height in sizes) >= photos.LARGEST_SIDE
    assert photos.IMAGE_SIZES[1] < photos.LARGEST_SIDE


def test_training_and_test_crops_see_different_pixels(monkeypatch):
    """A picture that is black up to the gap and white after it gives black training and white test crops."""
    from PIL import Image

    def halves(_path):
        pixels = np.zeros((200, 600, 3), dtype=np.uint8)
        pixels[:, 390:400] = 127  # the gap: 0.65 of the width to two thirds of it
        pixels[:, 400:] = 255
        return Image.fromarray(pixels)

    monkeypatch.setattr(photos, "_read_rgb", halves)
    (train, _), (test, _) = photos.make_photos(train_samples=360, test_samples=360, image_size=16)
    assert train.max() == 0
    assert test.min() == 255


def test_the_default_set_is_made_in_seconds():
    started = time.process_time()
    load_dataset(DataConfig())
    assert time.process_time() - started < 15  # about 1 s of one core; the rest is for slow machines


def test_missing_package_is_refused_with_the_way_out(monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "skimage" else found(name, *rest)
    )
    with pytest.raises(ConfigError, match=r'scikit-image is not installed.*pip install.*"synthetic"'):
        check_dataset(DataConfig(loader="torch"))
    with pytest.raises(ConfigError, match="scikit-image is not installed"):
        load_dataset(DataConfig())


def test_missing_picture_is_refused_by_its_path(monkeypatch):
    monkeypatch.setattr(photos, "_PLACES", (("skimage", "scikit-image", "data", ("astronaut.png", "no.png")),))
    with pytest.raises(ConfigError, match=r"data/no\.png, a part of scikit-image, does not exist.*reinstall"):
        check_dataset(DataConfig(loader="torch"))


def test_unreadable_picture_is_refused_by_its_path(monkeypatch, tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"not a picture")
    monkeypatch.setattr(photos, "find_pictures", lambda: [broken])
    with pytest.raises(ConfigError, match=r"broken\.png cannot be read.*Reinstall"):
        photos.make_photos(train_samples=1, test_samples=1, image_size=32)
