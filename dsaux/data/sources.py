"""Where samples come from: one entry for each name of dsaux.data.name, and what is refused before a run.

made in memory   photos, synthetic      photos.py, synthetic.py
read at once     cifar10, cifar100      cifar.py
read as needed   imagenet, folder       layout.py
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from dsaux.config_rules import ConfigError, show
from dsaux.data import cifar, layout, photos, synthetic, text
from dsaux.data.images import ImageDataset, channel_statistics

if TYPE_CHECKING:
    from dsaux.config import DataConfig
    from dsaux.data.stream import Dataset
    from dsaux.models.shapes import SampleSpec

MADE_SAMPLES = (6000, 1800)
"""Training and test images that are made where the configuration gives no number."""
SMALL_IMAGE_SIZE = 32


@dataclass(frozen=True)
class DataFacts:
    """What is known of a data set without its samples.

    Attributes:
        num_classes: number of classes.
        input_spec: what one sample of a batch is.
        num_train: samples to train on.
        num_test: samples to test with.
    """

    num_classes: int
    input_spec: SampleSpec
    num_train: int
    num_test: int


class Source(Protocol):
    """One data set, or a kind of them.

    Attributes:
        image_sizes: least and greatest side of the images in pixels.
        default_image_size: side where dsaux.data.image_size is null.
        keeps_images: all images are held in memory.
        unused: keys of dsaux.data that have no effect here, each with the reason.
    """

    @property
    def image_sizes(self) -> tuple[int, int]: ...

    @property
    def default_image_size(self) -> int: ...

    @property
    def keeps_images(self) -> bool: ...

    @property
    def unused(self) -> Mapping[str, str]: ...

    def check_settings(self, data: DataConfig) -> None:
        """Refuse what is wrong wherever the files are."""
        ...

    def check(self, data: DataConfig) -> None:
        """Refuse what is wrong with the files, without making or reading the samples; may fetch missing ones."""
        ...

    def counts(self, data: DataConfig) -> tuple[int, int]:
        """Training and test samples, found without making or reading them; the published ones where it is not there."""
        ...

    def facts(self, data: DataConfig) -> DataFacts:
        """What a run would train on; a well-known data set need not be there."""
        ...

    def load(self, data: DataConfig) -> Dataset:
        """Make, read or find the samples."""
        ...


_NO_COLOUR = "has no colour jitter"
_NO_TEXT = "holds images"
_SMALL_IMAGES = {"color": _NO_COLOUR, "context": _NO_TEXT}


@dataclass(frozen=True)
class MadeImages:
    """Images that are made in memory; `make` takes train_samples, test_samples and image_size."""

    num_classes: int
    image_sizes: tuple[int, int]
    find: Callable[[], object]
    make: Callable[..., tuple[synthetic.Split, synthetic.Split]]
    classes: tuple[str, ...] | None = None
    default_image_size: int = SMALL_IMAGE_SIZE
    keeps_images: bool = True

    @property
    def unused(self) -> Mapping[str, str]:
        """They read no folder."""
        return {"root": "is made in memory and reads no folder", **_SMALL_IMAGES}

    def check_settings(self, data: DataConfig) -> None:
        """A sample of each class at least."""
        _check_classes(data, self.counts(data), num_classes=self.num_classes, name=data.name)

    def check(self, data: DataConfig) -> None:
        """Look for what the images are made of."""
        self.find()

    def counts(self, data: DataConfig) -> tuple[int, int]:
        """As many as asked for."""
        train, test = MADE_SAMPLES
        return data.train_samples or train, data.test_samples or test

    def facts(self, data: DataConfig) -> DataFacts:
        """Known beforehand."""
        return _image_facts(data, self.num_classes, self.counts(data))

    def load(self, data: DataConfig) -> ImageDataset:
        """Make them."""
        train_samples, test_samples = self.counts(data)
        train, test = self.make(train_samples=train_samples, test_samples=test_samples, image_size=image_size(data))
        return _in_memory(data, train, test, num_classes=self.num_classes, classes=self.classes)


@dataclass(frozen=True)
class CifarFiles:
    """CIFAR-10 or CIFAR-100."""

    kind: cifar.Kind
    default_image_size: int = cifar.SIDE
    keeps_images: bool = True
    image_sizes: tuple[int, int] = (cifar.SIDE, cifar.SIDE)

    @property
    def unused(self) -> Mapping[str, str]:
        """Colours change by rand_augment here."""
        return _SMALL_IMAGES

    def check_settings(self, data: DataConfig) -> None:
        """A sample of each class at least."""
        for key in ("train_samples", "test_samples"):
            if (samples := getattr(data, key)) is not None:
                _check_class_count(key, samples, num_classes=self.kind.num_classes, name=data.name)

    def check(self, data: DataConfig) -> None:
        """Hold the files against the format."""
        cifar.check_files(data)

    def counts(self, data: DataConfig) -> tuple[int, int]:
        """Of the files."""
        return cifar.sample_counts(data)

    def facts(self, data: DataConfig) -> DataFacts:
        """Known beforehand but for the numbers."""
        return _image_facts(data, self.kind.num_classes, self.counts(data))

    def load(self, data: DataConfig) -> ImageDataset:
        """Read them."""
        train, test, classes = cifar.read(data)
        return _in_memory(data, train, test, num_classes=self.kind.num_classes, classes=classes)


@dataclass(frozen=True)
class ImageFiles:
    """Images in folders or shards."""

    name: str
    default_image_size: int = layout.IMAGE_SIZE
    keeps_images: bool = False
    image_sizes: tuple[int, int] = layout.IMAGE_SIZES

    @property
    def unused(self) -> Mapping[str, str]:
        """What is for small images in memory."""
        reason = "has random-resized crops and dsaux.data.color instead"
        return {"cutout": reason, "rand_augment": reason, "context": _NO_TEXT}

    def check_settings(self, data: DataConfig) -> None:
        """The folders say how many classes there are."""

    def check(self, data: DataConfig) -> None:
        """Look at the folders."""
        layout.check_files(data)

    def counts(self, data: DataConfig) -> tuple[int, int]:
        """Of the folders; the published numbers where a data set that everybody has the same is not there."""
        if self._is_elsewhere(data):
            _, train, test = layout.PUBLISHED[self.name]
            return data.train_samples or train, data.test_samples or test
        return layout.file_counts(data)

    def facts(self, data: DataConfig) -> DataFacts:
        """Of the folders, likewise."""
        if self._is_elsewhere(data):
            return _image_facts(data, layout.PUBLISHED[self.name][0], self.counts(data))
        dataset = self.load(data)
        return DataFacts(dataset.num_classes, dataset.input_spec, dataset.num_train, dataset.num_test)

    def load(self, data: DataConfig) -> Dataset:
        """List them."""
        return layout.load_files(data)

    def _is_elsewhere(self, data: DataConfig) -> bool:
        return self.name in layout.PUBLISHED and not layout.is_there(data)


@dataclass(frozen=True)
class Text:
    """Characters."""

    image_sizes: tuple[int, int] = (0, 0)
    default_image_size: int = 0
    keeps_images: bool = False

    @property
    def unused(self) -> Mapping[str, str]:
        """All that is for images."""
        return {
            "root": "comes with Python and reads no folder",
            **dict.fromkeys(("image_size", "color", "cutout", "rand_augment"), "has no images"),
        }

    def check_settings(self, data: DataConfig) -> None:
        """The text comes with Python, and is looked at whatever is asked."""

    def check(self, data: DataConfig) -> None:
        """Look for the text."""
        text.check_text(data)

    def counts(self, data: DataConfig) -> tuple[int, int]:
        """Blocks of it."""
        return text.text_counts(data)

    def facts(self, data: DataConfig) -> DataFacts:
        """Known beforehand but for the numbers."""
        from dsaux.models.shapes import SampleSpec

        symbols = len(text.SYMBOLS)
        spec = SampleSpec((data.context,), causal=True, vocabulary=symbols)
        return DataFacts(symbols, spec, *self.counts(data))

    def load(self, data: DataConfig) -> Dataset:
        """Read it."""
        return text.load_text(data)


SOURCES: Mapping[str, Source] = {
    "photos": MadeImages(
        photos.NUM_CLASSES, photos.IMAGE_SIZES, photos.find_pictures, photos.make_photos, photos.CLASSES
    ),
    "synthetic": MadeImages(synthetic.NUM_CLASSES, synthetic.IMAGE_SIZES, lambda: None, synthetic.make_synthetic),
    **{name: CifarFiles(kind) for name, kind in cifar.KINDS.items()},
    **{name: ImageFiles(name) for name in layout.DEFAULT_ROOTS},
    "text": Text(),
}


def source_of(name: str) -> Source:
    """The entry of a data set.

    Raises:
        ConfigError: if there is none.
    """
    if name not in SOURCES:
        raise ConfigError(f"dsaux.data.name is {show(name)}; it must be one of {', '.join(SOURCES)}. Change it.")
    return SOURCES[name]


def check_dataset(data: DataConfig) -> None:
    """Refuses every mistake in "dsaux.data" that can be seen without making or reading the samples.

    Files that are missing are fetched here, where the data set can be and `data.download` is true.

    Raises:
        ConfigError: names the key, what was given, what is allowed and the mend.
    """
    check_data_settings(data)
    if data.loader == "dali" and data.name != "text":  # which says that DALI has nothing to do there
        require_dali()
    source_of(data.name).check(data)


def check_data_settings(data: DataConfig) -> None:
    """Refuses what is wrong wherever the files and the loader's package are: all that a dry run can see.

    Raises:
        ConfigError: as `check_dataset`.
    """
    source = source_of(data.name)
    _check_effect(data, source)
    low, high = source.image_sizes
    if not low <= image_size(data) <= high:
        can_have = f"can be made with {low} .. {high}" if low < high else f"has images of {low} x {high}"
        raise ConfigError(
            f"dsaux.data.image_size is {data.image_size}; {data.name} {can_have} pixels. Change it, or leave it out "
            f"for the default {source.default_image_size}."
        )
    check_augmentation(data)
    if data.loader == "dali" and data.name != "text":
        refuse_dali_workers(data.workers)
    source.check_settings(data)


def check_augmentation(data: DataConfig) -> None:
    """Refuses augmentation that could have no effect or leave nothing of an image.

    Raises:
        ConfigError: names the key and the mend.
    """
    for key in ("cutout", "rand_augment", "color"):
        value = getattr(data, key)
        if value and not data.augment:
            raise ConfigError(
                f"dsaux.data.{key} is {value:g} but dsaux.data.augment is false, so it has no effect. Set augment to "
                f"true, or {key} to 0."
            )
    if data.cutout > image_size(data):
        raise ConfigError(
            f"dsaux.data.cutout is {data.cutout}, more than the image's side of {image_size(data)} pixels "
            f"(dsaux.data.image_size). Set it to {image_size(data) // 2} or so, or to 0 for none."
        )


def default_image_size(name: str) -> int:
    """Side of the images in pixels where dsaux.data.image_size is null; of an unknown data set that of small ones."""
    return SOURCES[name].default_image_size if name in SOURCES else SMALL_IMAGE_SIZE


def image_size(data: DataConfig) -> int:
    """Side of the images in pixels."""
    return source_of(data.name).default_image_size if data.image_size is None else data.image_size


def sample_counts(data: DataConfig) -> tuple[int, int]:
    """Training and test samples that a run would have, found without making or reading them.

    Where a data set that is the same for everybody is not there, it has the published numbers: `check_dataset` refuses
    that, and a dry run goes on.

    Raises:
        ConfigError: if there is no such data set, or it is not as it must be.
    """
    return source_of(data.name).counts(data)


def dataset_facts(data: DataConfig) -> DataFacts:
    """What a run would train on; a well-known data set need not be there.

    Raises:
        ConfigError: if there is no such data set, or it is not as it must be.
    """
    return source_of(data.name).facts(data)


def load_dataset(data: DataConfig) -> Dataset:
    """Makes, reads or finds the samples: the same ones for the same configuration, whatever the seed of the run.

    Raises:
        ConfigError: if they cannot be had, e.g. a photograph or a file is missing.
    """
    return source_of(data.name).load(data)


def require_dali() -> None:
    """Refuses a run that asks for DALI on a machine without it; nothing is imported.

    Raises:
        ConfigError: if nvidia.dali cannot be found.
    """
    try:
        found = importlib.util.find_spec("nvidia.dali") is not None
    except (ImportError, ValueError):  # no package "nvidia" at all
        found = False
    if not found:
        raise ConfigError(
            'dsaux.data.loader is "dali" but NVIDIA DALI is not installed. Install it with pip install '
            "'dsaux[dali-cu13]' (or dali-cu12), or set dsaux.data.loader to \"torch\"."
        )


def refuse_dali_workers(workers: int) -> None:
    """Refuses worker processes for the DALI loader.

    Raises:
        ConfigError: if `workers` is not 0.
    """
    if workers:
        raise ConfigError(
            f'dsaux.data.workers is {workers} but dsaux.data.loader is "dali", which loads in threads of its '
            'own. Remove workers, or set dsaux.data.loader to "torch".'
        )


# ---- parts ----------------------------------------------------------------------------------------------------------


def _check_effect(data: DataConfig, source: Source) -> None:
    from dsaux.config import default_value  # dsaux.config imports dsaux.launch_check, which asks this file

    for key, reason in source.unused.items():
        value = getattr(data, key)
        if value != default_value(f"dsaux.data.{key}"):
            raise ConfigError(
                f"dsaux.data.{key} is {show(value)} but {data.name} {reason}; it would have no effect. Remove "
                f"dsaux.data.{key}."
            )


def _check_classes(data: DataConfig, counts: tuple[int, int], *, num_classes: int, name: str) -> None:
    for key, samples in zip(("train_samples", "test_samples"), counts, strict=True):
        _check_class_count(key, samples, num_classes=num_classes, name=name)


def _check_class_count(key: str, samples: int, *, num_classes: int, name: str) -> None:
    if samples < num_classes:
        raise ConfigError(
            f"dsaux.data.{key} is {samples}, fewer than the {num_classes} classes of {name}. "
            f"Set it to {num_classes} or more."
        )


def _image_facts(data: DataConfig, num_classes: int, counts: tuple[int, int]) -> DataFacts:
    from dsaux.models.shapes import SampleSpec

    return DataFacts(num_classes, SampleSpec((3, image_size(data), image_size(data))), *counts)


def _in_memory(
    data: DataConfig,
    train: synthetic.Split,
    test: synthetic.Split,
    *,
    num_classes: int,
    classes: tuple[str, ...] | None,
) -> ImageDataset:
    mean, std = channel_statistics(train[0])
    return ImageDataset(
        name=data.name,
        train_images=train[0],
        train_labels=train[1],
        test_images=test[0],
        test_labels=test[1],
        num_classes=num_classes,
        mean=mean,
        std=std,
        classes=classes,
        cutout=data.cutout,
        rand_augment=data.rand_augment,
    )
