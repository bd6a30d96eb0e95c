"""Numbers that keep their rule but that no run can mean: they would only cost the machine's memory or endless time.

Part of `dsaux.launch_check`. A limit here is far above what a sensible run asks for.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from dsaux.config_rules import ConfigError, show
from dsaux.data import image_size, sample_counts, source_of
from dsaux.data.augment import PADDING

if TYPE_CHECKING:  # dsaux.config imports dsaux.launch_check, which imports this file
    from dsaux.config import Config, DataConfig

_WORKERS_PER_CORE = 16
_MOST = {
    "aux.depth": (100, "a segment is a small network"),
    "aux.width": (100, "a segment is a small network"),
    "run.bn_batches": (10_000, "their average does not change any more"),
    "run.profile_steps": (1000, "the trace of a rank would have gigabytes"),
    "run.timeout_s": (365 * 24 * 3600, "that is a year"),
}
_GIB = 2**30


def check_sizes(config: Config) -> None:
    """Refuses a number that is out of all proportion.

    Raises:
        ConfigError: names the key, the limit and its reason.
    """
    for path, (most, why) in _MOST.items():
        block, key = path.split(".")
        value = getattr(getattr(config.dsaux, block), key)
        if value > most:
            raise ConfigError(f"dsaux.{path} is {show(value)}, more than {most}: {why}. Set it to {most} or less.")
    _check_workers(config.dsaux.data.workers)
    _check_images(config.dsaux.data, memory_bytes=_memory_bytes())


def _check_workers(workers: int) -> None:
    cores = os.cpu_count() or 1
    most = _WORKERS_PER_CORE * cores
    if workers > most:
        raise ConfigError(
            f"dsaux.data.workers is {show(workers)}, more than {most}, {_WORKERS_PER_CORE} for each of this machine's"
            f" {cores} cores. Each is a process with memory of its own. Set it to {most} or less."
        )


def _check_images(data: DataConfig, *, memory_bytes: int | None) -> None:
    """Refuses images that the machine cannot hold; the training images are held with their padding as well."""
    if not source_of(data.name).keeps_images:
        return
    side, padded = image_size(data), image_size(data) + 2 * PADDING
    train_samples, test_samples = sample_counts(data)
    needed = 3 * (train_samples * (side**2 + padded**2) + test_samples * side**2)
    if memory_bytes is not None and needed > memory_bytes:
        key = "train_samples" if train_samples >= test_samples else "test_samples"
        raise ConfigError(
            f"dsaux.data.{key} is {show(getattr(data, key))}: the images of {side} x {side} pixels would take"
            f" {show(needed // _GIB)} GiB, but this machine has {memory_bytes // _GIB} GiB of memory. Lower it, or"
            " dsaux.data.image_size."
        )


def _memory_bytes() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return None
