"""The data: which sets there are, what is refused before a run, and the names the rest of dsaux uses.

`dsaux.config` calls `check_dataset` before any process group exists and `train.py` calls `load_dataset`, so
importing this file brings in neither PyTorch nor DALI. `ReplicaStream`, `test_batches` (stream.py) and
`batch_digest` (guard.py) are loaded when they are first asked for.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from dsaux.data.images import ImageDataset
from dsaux.data.sources import (
    DataFacts,
    check_data_settings,
    check_dataset,
    dataset_facts,
    default_image_size,
    image_size,
    load_dataset,
    refuse_dali_workers,
    require_dali,
    sample_counts,
    source_of,
)

if TYPE_CHECKING:
    from dsaux.data.guard import batch_digest
    from dsaux.data.stream import Dataset, ReplicaStream, test_batches

__all__ = [
    "DataFacts",
    "Dataset",
    "ImageDataset",
    "ReplicaStream",
    "batch_digest",
    "check_data_settings",
    "check_dataset",
    "dataset_facts",
    "default_image_size",
    "image_size",
    "load_dataset",
    "refuse_dali_workers",
    "require_dali",
    "sample_counts",
    "source_of",
    "test_batches",
]

_LATER = {
    "Dataset": "dsaux.data.stream",
    "ReplicaStream": "dsaux.data.stream",
    "test_batches": "dsaux.data.stream",
    "batch_digest": "dsaux.data.guard",
}


def __getattr__(name: str) -> Any:
    if name in _LATER:
        return getattr(importlib.import_module(_LATER[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
