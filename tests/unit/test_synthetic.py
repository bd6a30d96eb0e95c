"""The synthetic images, and what `check_dataset` refuses for any data set."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

from dsaux.config import ConfigError, DataConfig
from dsaux.data import check_dataset, load_dataset

SYNTHETIC = DataConfig(name="synthetic", loader="torch", train_samples=500, test_samples=300, image_size=16)


@pytest.mark.parametrize("image_size", [8, 32, 45])
def test_images_have_the_promised_shapes_at_any_size(image_size):
    dataset = load_dataset(replace(SYNTHETIC, image_size=image_size))
    assert dataset.train_images.shape == (500, image_size, image_size, 3)
    assert dataset.test_images.shape == (300, image_size, image_size, 3)
    assert dataset.train_images.dtype == np.uint8
    assert set(np.bincount(dataset.train_labels)) == {50}


def test_two_loads_give_the_same_bytes():
    first, second = load_dataset(SYNTHETIC), load_dataset(SYNTHETIC)
    assert np.array_equal(first.train_images, second.train_images)
    assert np.array_equal(first.test_images, second.test_images)


def test_training_and_test_images_differ():
    dataset = load_dataset(SYNTHETIC)
    assert not np.array_equal(dataset.train_images[:300], dataset.test_images)


def test_the_nearest_class_mean_tells_most_test_images_but_not_all():
    dataset = load_dataset(SYNTHETIC)
    train = dataset.train_images.reshape(500, -1).astype(np.float64)
    test = dataset.test_images.reshape(300, -1).astype(np.float64)
    means = np.stack([train[dataset.train_labels == label].mean(axis=0) for label in range(10)])
    guesses = ((test[:, None] - means) ** 2).sum(axis=2).argmin(axis=1)
    assert 0.5 < (guesses == dataset.test_labels).mean() < 1.0  # chance is 0.1


def test_check_passes_a_good_configuration():
    check_dataset(SYNTHETIC)
    check_dataset(DataConfig(loader="torch"))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"name": "mnist"}, r'dsaux\.data\.name is "mnist".*photos, synthetic'),
        ({"root": "/no/such/folder"}, r'dsaux\.data\.root is "/no/such/folder".*Remove dsaux\.data\.root'),
        ({"root": "/"}, r'dsaux\.data\.root is "/".*Remove'),
        ({"image_size": 7}, r"dsaux\.data\.image_size is 7; synthetic .* 8 \.\. 512"),
        ({"name": "photos", "image_size": 65}, r"dsaux\.data\.image_size is 65; photos .* 8 \.\. 64"),
        ({"train_samples": 9}, r"dsaux\.data\.train_samples is 9, fewer than the 10 classes.*10 or more"),
        ({"test_samples": 9}, r"dsaux\.data\.test_samples is 9, fewer than the 10 classes"),
        ({"name": "photos", "test_samples": 17}, r"test_samples is 17, fewer than the 18 classes of photos"),
    ],
)
def test_check_names_the_key_and_the_mend(change, words):
    with pytest.raises(ConfigError, match=words) as caught:
        check_dataset(replace(SYNTHETIC, **change))
    assert "\n" not in str(caught.value)


def test_dali_with_worker_processes_is_refused(monkeypatch):
    monkeypatch.setattr("dsaux.data.require_dali", lambda: None)
    with pytest.raises(ConfigError, match=r"dsaux\.data\.workers is 2 .* Remove workers"):
        check_dataset(replace(SYNTHETIC, loader="dali", workers=2))


@pytest.mark.parametrize("missing", ["nvidia", "nvidia.dali"])
def test_missing_dali_is_refused_with_the_way_out(monkeypatch, missing):
    found = importlib.util.find_spec

    def find(name, *rest):
        if name == "nvidia.dali":
            if missing == "nvidia":
                raise ModuleNotFoundError("No module named 'nvidia'")
            return None
        return found(name, *rest)

    monkeypatch.setattr(importlib.util, "find_spec", find)
    with pytest.raises(ConfigError, match=r'NVIDIA DALI is not installed.*dsaux\[dali-cu13\].*"torch"'):
        check_dataset(replace(SYNTHETIC, loader="dali"))


def test_checking_the_configuration_imports_no_heavy_package():
    code = (
        "import sys\n"
        "from dsaux.config import DataConfig\n"
        "from dsaux.data import check_dataset, require_dali\n"
        "check_dataset(DataConfig(loader='torch'))\n"
        "try:\n    require_dali()\nexcept ValueError:\n    pass\n"
        "heavy = {'torch', 'skimage', 'sklearn', 'PIL', 'nvidia.dali', 'scipy'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
