"""Numbers out of all proportion are refused before they cost memory or time; what a sensible run asks for is not."""

from __future__ import annotations

import os
from typing import Any

import pytest

from dsaux import size_check
from dsaux.config import Config, ConfigError, check_launch, config_from_dict
from tests.bad_input import good_config


def _config(sets: dict[str, Any]) -> Config:
    return config_from_dict(good_config(sets))


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("aux.depth", 101, "dsaux.aux.depth is 101, more than 100"),
        ("aux.width", 1e308, r"dsaux.aux.width is 1e\+308, more than 100"),
        ("run.bn_batches", 2**62, "dsaux.run.bn_batches is 4611686018427387904, more than 10000"),
        ("run.timeout_s", 2**62, "dsaux.run.timeout_s is 4611686018427387904, more than 31536000: that is a year"),
        ("data.workers", 2**62, "dsaux.data.workers is 4611686018427387904.* Set it to"),
        ("data.train_samples", 2**40, "train_samples is 1099511627776: the images of 32 x 32 pixels .* GiB of memory"),
        (
            "data.test_samples",
            2**62,
            "dsaux.data.test_samples is 4611686018427387904.* Lower it, or dsaux.data.image_size",
        ),
    ],
)
def test_number_out_of_proportion_is_refused(key: str, value: Any, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        check_launch(_config({f"dsaux.{key}": value}), world_size=2)


@pytest.mark.parametrize(
    "sets",
    [
        {"dsaux.aux.depth": 100, "dsaux.aux.width": 100, "dsaux.run.bn_batches": 10_000},
        {"dsaux.run.timeout_s": 365 * 24 * 3600, "dsaux.data.workers": 16 * (os.cpu_count() or 1)},
        {"dsaux.run.epochs": 10**15, "dsaux.run.eval_batch_size": 10**9, "dsaux.data.guard_every": 10**9},
    ],
)
def test_large_number_is_let_through(sets: dict[str, Any]) -> None:
    check_launch(_config(sets), world_size=2)


# 100 training images of 8 x 8 pixels, held with a padding of 4 as well, and 50 test images
@pytest.mark.parametrize(("memory_bytes", "fits"), [(105_600, True), (105_599, False), (None, True)])
def test_images_must_fit_the_memory(memory_bytes: int | None, fits: bool) -> None:
    data = _config(
        {"dsaux.data.train_samples": 100, "dsaux.data.test_samples": 50, "dsaux.data.image_size": 8}
    ).dsaux.data
    if fits:
        size_check._check_images(data, memory_bytes=memory_bytes)
    else:
        with pytest.raises(ConfigError, match="train_samples is 100"):
            size_check._check_images(data, memory_bytes=memory_bytes)
