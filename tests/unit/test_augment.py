"""Cutout and the operations as in RandAugment: how often which is drawn, equal in both loaders, as torchvision's."""

from __future__ import annotations

import pickle
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torchvision.transforms import InterpolationMode, RandomCrop, RandomHorizontalFlip
from torchvision.transforms import functional as reference

from dsaux.config import ConfigError, DataConfig
from dsaux.data import ImageDataset, batch_digest, check_dataset, load_dataset
from dsaux.data.apply import erase, recolour, warp
from dsaux.data.augment import CropFlip, StrongAugment
from dsaux.data.distort import MOST_COLOUR, MOST_DEGREES, MOST_SHEAR, MOST_SHIFT, OPERATIONS, compose
from dsaux.data.stream import LoaderSettings, TrainPlan
from dsaux.data.torch_loader import InProcessLoader, WorkerLoader
from tests.cifar_folders import EVERYTHING, digests_of_everything_on, pictures_for, write_binary, write_python
from tests.unit.test_stream import equal, numbered_dataset, stream_of, take

ROOT = Path(__file__).parents[2]
ON = EVERYTHING


@pytest.fixture(scope="module")
def photos() -> ImageDataset:
    return load_dataset(DataConfig(train_samples=180, test_samples=18))


def switched_on(dataset: ImageDataset, **changes: int) -> ImageDataset:
    return replace(dataset, **{**ON, **changes})


# ---- off: nothing has changed ---------------------------------------------------------------------------------------


def test_with_both_off_the_stream_is_what_it_was_before_there_were_any(photos):
    """Digests of the torch loader at the commit before; float32 subtraction and division are exact everywhere."""
    assert [batch_digest(*batch) for batch in take(stream_of(photos, micro_batch_size=32), 8)] == [
        *(10750982, 3091766, 14011480, 6626542, 15552357),  # the first epoch
        *(12337651, 15426379, 7265578),
    ]
    assert [batch_digest(*batch) for batch in take(stream_of(numbered_dataset()), 14)] == [
        *(6325902, 8704938, 10577267, 12773305, 10046234, 5879980, 5252752),
        *(12356927, 12986554, 14882744, 16087622, 13857205, 1446482, 10676312),
    ]


@pytest.mark.parametrize(
    ("keys", "inside"),
    [
        ({}, set()),
        ({"cutout": 4}, {b"Erase"}),
        ({"rand_augment": 4}, {b"WarpAffine", b"CoordTransform"}),
        (ON, {b"Erase", b"WarpAffine", b"CoordTransform"}),
    ],
)
def test_the_pipeline_of_dali_holds_only_what_is_switched_on(photos, keys, inside):
    pytest.importorskip("nvidia.dali")
    loader: Any = stream_of(replace(photos, **keys), loader="dali")._loader
    content = loader._build().serialize()
    assert {name for name in (b"Erase", b"WarpAffine", b"CoordTransform") if name in content} == inside


def test_an_evaluation_is_never_augmented(photos):
    from dsaux.data import test_batches

    for loader in ("torch", "dali"):
        plain, strong = (
            list(test_batches(one, loader=loader, replica=0, num_replicas=1, batch_size=9, device="cpu"))
            for one in (photos, switched_on(photos))
        )
        assert equal(plain, strong)


def test_crops_and_flips_stay_the_same_when_more_is_drawn():
    plain, strong = CropFlip(), StrongAugment((32, 32), **ON)
    first, second = (one.draw(np.random.default_rng(3), 500) for one in (plain, strong))
    assert set(second) == {*first, "erased", "colour", "warp"}
    for name in first:
        assert np.array_equal(first[name], second[name])


# ---- the same in both loaders ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [8, 32, 33])
@pytest.mark.parametrize("keys", [{"cutout": 5}, {"rand_augment": 1}, {"rand_augment": 10}, ON])
def test_dali_and_torch_give_the_same_batches(size, keys):
    """On noise, the hardest case.

    Two places differ by some 1e-6 of a pixel's coordinate in float32, times 33 pixels, and neighbouring pixels by up
    to 4.3 standard deviations: 5e-4 is above what that makes. Without interpolation float rounding is all there is.
    """
    pytest.importorskip("nvidia.dali")
    dataset = replace(numbered_dataset(size=size), **keys)
    ours, dali = (take(stream_of(dataset, loader=loader), 14) for loader in ("torch", "dali"))
    tolerance = 5e-4 if "rand_augment" in keys else 1e-5
    for (inputs, labels), (dali_inputs, dali_labels) in zip(ours, dali, strict=True):
        assert torch.equal(labels, dali_labels)
        assert inputs.shape == dali_inputs.shape
        assert torch.allclose(inputs, dali_inputs, rtol=0, atol=tolerance)
        if "cutout" in keys:
            assert torch.equal(inputs == 0, dali_inputs == 0) or "rand_augment" in keys


def test_worker_processes_are_handed_what_the_training_process_makes(photos):
    """The data set of a worker, as it arrives there: a pickle."""
    stream: Any = stream_of(switched_on(photos))
    plan = stream._loader._crops._plan
    settings = LoaderSettings("torch", 8, torch.device("cpu"), workers=1)
    loader: Any = switched_on(photos).train_loader(plan, settings, augment=True)
    assert isinstance(loader, WorkerLoader)
    assert isinstance(stream._loader, InProcessLoader)
    arrived = pickle.loads(pickle.dumps(loader._dataset))
    assert equal([arrived[position] for position in range(3)], take(stream, 3))


def test_two_processes_get_identical_digests_for_two_epochs_and_after_seek(tmp_path):
    pytest.importorskip("nvidia.dali")
    write_python(tmp_path, pictures_for(10))
    write_binary(tmp_path, pictures_for(100))
    code = f"from tests.cifar_folders import digests_of_everything_on as d; print(d({str(tmp_path)!r}))"
    other = subprocess.run(
        [sys.executable, "-c", code], check=True, timeout=120, capture_output=True, text=True, cwd=ROOT
    )
    mine = digests_of_everything_on(str(tmp_path))
    assert other.stdout.strip().splitlines()[-1] == str(mine)
    for digests in mine.values():
        assert len(digests) == 8
        assert digests[6:] == digests[1:3]
        assert len(set(digests[:6])) == 6


# ---- what is done to an image ---------------------------------------------------------------------------------------


def test_an_image_that_draws_the_identity_twice_is_left_as_it_is(photos):
    pytest.importorskip("nvidia.dali")
    dataset = replace(photos, rand_augment=10)
    for loader in ("torch", "dali"):
        plain, strong = (take(stream_of(one, loader=loader, micro_batch_size=90), 2) for one in (photos, dataset))
        stream: Any = stream_of(dataset, micro_batch_size=90)
        untouched = 0
        for position in range(2):
            draws = stream._loader._crops._plan.rows(position).draws
            same = (draws["warp"] == np.eye(2, 3)).all(axis=(1, 2)) & (draws["colour"] == np.eye(3, 4)).all(axis=(1, 2))
            untouched += same.sum()
            assert torch.allclose(plain[position][0][same], strong[position][0][same], rtol=0, atol=1e-6)  # rounding
            moved = (plain[position][0] - strong[position][0]).abs().amax(dim=(1, 2, 3)) > 1e-3
            far = abs(draws["warp"] - np.eye(2, 3)).max(axis=(1, 2)) > 0.01  # left and back right is near the identity
            assert moved[torch.from_numpy(far)].all()
        assert untouched  # 2.2 of 180 are expected; this seed has some


def maps_of(operation: str, amount: float, *, size: int = 32) -> tuple[Any, Any]:
    index = OPERATIONS.index(operation)
    return compose(np.array([[index], [0]]), np.array([[amount], [1.0]]), size=(size, size))


def _rotated(images: Tensor, amount: float) -> Tensor:
    return reference.rotate(images, MOST_DEGREES * amount, interpolation=InterpolationMode.BILINEAR)


def _affine(images: Tensor, *, shift: tuple[float, float] = (0, 0), slope: tuple[float, float] = (0, 0)) -> Tensor:
    degrees = [float(np.rad2deg(np.arctan(part))) for part in slope]
    return reference.affine(
        images, angle=0.0, translate=list(shift), scale=1.0, shear=degrees, interpolation=InterpolationMode.BILINEAR
    )


PLACES: dict[str, Callable[[Tensor, float], Tensor]] = {
    "rotate": _rotated,
    "shear_x": lambda images, amount: _affine(images, slope=(-MOST_SHEAR * amount, 0)),
    "shear_y": lambda images, amount: _affine(images, slope=(0, -MOST_SHEAR * amount)),
    "translate_x": lambda images, amount: _affine(images, shift=(MOST_SHIFT * 32 * amount, 0)),
    "translate_y": lambda images, amount: _affine(images, shift=(0, MOST_SHIFT * 32 * amount)),
}
"""torchvision's counterparts; their signs, which are drawn, are taken as they fit."""

COLOURS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "brightness": lambda images, amount: reference.adjust_brightness(images, 1 + MOST_COLOUR * amount),
    "contrast": lambda images, amount: reference.adjust_contrast(images, 1 + MOST_COLOUR * amount),
    "saturation": lambda images, amount: reference.adjust_saturation(images, 1 + MOST_COLOUR * amount),
}


def photo_of(dataset: ImageDataset) -> Tensor:
    return torch.from_numpy(dataset.train_images[:1]).permute(0, 3, 1, 2).float()


@pytest.mark.parametrize("operation", PLACES)
@pytest.mark.parametrize("amount", [-1.0, 0.3, 1.0])
def test_each_operation_on_places_is_torchvisions(photos, operation, amount):
    """0.02 of 255: both interpolate in float32 from places that differ by rounding."""
    image = photo_of(photos)
    if operation.startswith("translate"):
        amount = round(amount * MOST_SHIFT * 32) / (MOST_SHIFT * 32)  # torchvision moves by whole pixels
    assert torch.allclose(
        warp(image.clone(), maps_of(operation, amount)[1]), PLACES[operation](image, amount), rtol=0, atol=0.02
    )


@pytest.mark.parametrize("operation", COLOURS)
@pytest.mark.parametrize("amount", [-1.0, 0.3, 1.0])
def test_each_operation_on_colours_is_torchvisions(photos, operation, amount):
    """0.05 of 255: torchvision has 0.2989 and so on for the weights of a grey. An image of mean grey for `contrast`."""
    image = photo_of(photos) / 255
    for _ in range(20):  # clipped, so that the mean is reached step by step
        image = (image + 0.5 - reference.rgb_to_grayscale(image).mean()).clamp(0, 1)
    ours = recolour(image * 255, maps_of(operation, amount)[0])
    assert torch.allclose(ours, 255 * COLOURS[operation](image, amount), rtol=0, atol=0.05)


def test_two_operations_follow_each_other_in_their_order(photos):
    """In the columns that do not come from outside: one pass brings back what two passes lose there."""
    rotate, shift = OPERATIONS.index("rotate"), OPERATIONS.index("translate_x")
    image, amounts = photo_of(photos), np.array([[1.0], [-0.5]])
    amounts[1] = -8 / (MOST_SHIFT * 32)
    ours = warp(image.clone(), compose(np.array([[rotate], [shift]]), amounts, size=(32, 32))[1])
    theirs = PLACES["translate_x"](PLACES["rotate"](image, 1.0), float(amounts[1, 0]))
    assert torch.allclose(ours[..., :24], theirs[..., :24], rtol=0, atol=0.02)
    assert theirs[..., 24:].max() == 0
    other = warp(image.clone(), compose(np.array([[shift], [rotate]]), amounts[::-1], size=(32, 32))[1])
    assert not torch.allclose(ours, other, rtol=0, atol=10)
    brighter, paler = OPERATIONS.index("brightness"), OPERATIONS.index("contrast")
    maps = compose(np.array([[brighter], [paler]]), np.array([[0.5], [-0.5]]), size=(32, 32))[0]
    assert maps[0, 0].tolist() == pytest.approx([1.45 * 0.55, 0, 0, 0.45 * 127.5])


def test_a_box_is_greyed_out_and_no_more():
    images = torch.ones(2, 3, 6, 5)
    erase(images, np.array([[0, 1, 2, 3], [5, 0, 6, 5]]))
    assert images[0, 0].tolist() == [[1, 0, 0, 1, 1], [1, 0, 0, 1, 1], *[[1] * 5] * 4]
    assert images[1, 2].tolist() == [*[[1] * 5] * 5, [0] * 5]


# ---- how often ------------------------------------------------------------------------------------------------------


def test_crops_and_flips_are_distributed_as_torchvisions(photos):
    """Means of each pixel over 3,000 draws of one photograph, 5 standard errors of the two samples' difference."""
    count, image = 3000, photos.train_images[:1]
    one = replace(photos, train_images=np.repeat(image, count, axis=0), train_labels=np.zeros(count, dtype=np.int64))
    ours = next(stream_of(one, micro_batch_size=count))[0]
    torch.manual_seed(0)
    crop, flip = RandomCrop(32, padding=4, padding_mode="reflect"), RandomHorizontalFlip()
    picture = torch.from_numpy(image[0]).permute(2, 0, 1)
    theirs = torch.stack([flip(crop(picture)) for _ in range(count)]).float()
    mean, std = (torch.tensor(values).reshape(-1, 1, 1) for values in (photos.mean, photos.std))
    theirs = (theirs - mean) / std
    error = ((ours.var(0) + theirs.var(0)) / count).sqrt()
    assert ((ours.mean(0) - theirs.mean(0)).abs() <= 5 * error + 1e-5).all()
    assert ((ours.var(0) - theirs.var(0)).abs() <= 10 * error * ours.std(0) + 1e-5).all()


def test_places_are_cropped_and_half_of_the_images_flipped_as_often_as_by_torchvision():
    count = 9000
    draws = CropFlip().draw(np.random.default_rng(0), count)
    torch.manual_seed(0)
    picture = torch.zeros(3, 40, 40)
    theirs = np.array([RandomCrop.get_params(picture, (32, 32))[:2] for _ in range(count)])
    for name, values in zip(("top", "left"), theirs.T, strict=True):
        ours_count, their_count = np.bincount(draws[name], minlength=9), np.bincount(values, minlength=9)
        assert (abs(ours_count - their_count) < 5 * np.sqrt(2 * count / 9)).all()
    assert abs(draws["flip"].mean() - 0.5) < 5 * 0.5 / np.sqrt(count)


@pytest.mark.parametrize("side", [1, 7, 8, 32])
def test_each_pixel_is_greyed_out_as_often_as_centres_reach_it(side):
    count, size = 20_000, (32, 24)
    side = min(side, 24)
    boxes = StrongAugment(size, cutout=side).draw(np.random.default_rng(1), count)["erased"]
    found = 1 - erase(torch.ones(count, 1, *size), boxes).mean(dim=(0, 1)).numpy()
    expected = np.outer(*(_reached(length, side=side) for length in size))
    error = np.sqrt(expected * (1 - expected) / count)
    assert (abs(found - expected) <= 5.5 * error + 1e-6).all()  # 768 pixels: 4e-8 each
    assert (boxes[:, :2] >= 0).all()
    assert (boxes[:, 2:] <= size).all()
    assert ((boxes[:, 2:] - boxes[:, :2]).max(axis=0) == side).all()
    assert ((boxes[:, 2:] - boxes[:, :2]).min(axis=0) >= max(side // 2, 1)).all()


def _reached(length: int, *, side: int) -> np.ndarray:
    """Share of the centres whose square covers each place of a line."""
    centres, places = np.arange(length)[:, None], np.arange(length)
    return ((places >= centres - side // 2) & (places < centres - side // 2 + side)).mean(axis=0)


def test_operations_are_drawn_equally_often_with_either_sign(monkeypatch):
    count, seen = 20_000, []
    monkeypatch.setattr(
        "dsaux.data.distort.compose", lambda operations, amounts, size: (seen.append((operations, amounts)), (0, 0))[1]
    )
    StrongAugment((32, 32), rand_augment=6).draw(np.random.default_rng(0), count)
    operations, amounts = seen[0]
    share = 1 / len(OPERATIONS)
    for drawn in operations:
        frequencies = np.bincount(drawn, minlength=len(OPERATIONS)) / count
        assert (abs(frequencies - share) < 5 * np.sqrt(share * (1 - share) / count)).all()
    assert set(np.unique(abs(amounts))) == {0.6}
    assert abs((amounts > 0).mean() - 0.5) < 5 * 0.5 / np.sqrt(2 * count)
    pairs = np.bincount(operations[0] * 9 + operations[1], minlength=81) / count
    assert (abs(pairs - share**2) < 5.5 * share / np.sqrt(count)).all()  # independent of each other


def test_distorted_photographs_are_distributed_as_torchvisions(photos):
    """Two operations out of torchvision's nine for 900 images; the mean and the spread of each pixel.

    `contrast` is left to the test above: torchvision's depends on each image's own mean.
    """
    count, strength, image = 900, 6, photo_of(photos)
    left = [name for name in OPERATIONS if name != "contrast"]
    rng = np.random.default_rng(0)
    kinds = rng.choice([OPERATIONS.index(name) for name in left], size=(2, count))
    signs = np.where(rng.random((2, count)) < 0.5, -1.0, 1.0)
    colour, place = compose(kinds, signs * strength / 10, size=(32, 32))
    ours = warp(recolour(image.repeat(count, 1, 1, 1), colour), place)
    theirs = []
    for _ in range(count):
        picture = image / 255
        for name, sign in zip(rng.choice(left, size=2), rng.choice([-1.0, 1.0], size=2), strict=True):
            apply = {**PLACES, **COLOURS}.get(name, lambda images, amount: images)
            picture = apply(picture, sign * strength / 10)
        theirs.append(255 * picture[0])
    reference_images = torch.stack(theirs)
    error = ((ours.var(0) + reference_images.var(0)) / count).sqrt()
    difference = (ours.mean(0) - reference_images.mean(0)).abs()
    # 3,072 pixels: 5 standard errors, and 3 of 255 for whole pixels moved and places interpolated twice by torchvision.
    assert (difference <= 5 * error + 3).all()
    assert abs(ours.mean() - reference_images.mean()) < 5 * (error.mean() + 0.1)
    assert 0.9 < (ours.std(0).mean() / reference_images.std(0).mean()).item() < 1.1


def test_draws_depend_on_seed_and_epoch_alone():
    def draws(seed: int, position: int) -> Any:
        plan = TrainPlan(
            40,
            augmentation=StrongAugment((32, 32), **ON),
            seed=seed,
            replica=0,
            num_replicas=1,
            micro_batch_size=40,
            micro_batches_per_step=1,
        )
        return plan.rows(position).draws

    for name in ("erased", "colour", "warp"):
        assert np.array_equal(draws(1, 3)[name], draws(1, 3)[name])
        assert not np.array_equal(draws(1, 3)[name], draws(1, 2)[name])
        assert not np.array_equal(draws(1, 3)[name], draws(2, 3)[name])


# ---- refused --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["photos", "synthetic", "cifar10"])
@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (
            {"cutout": 8, "augment": False},
            r"dsaux\.data\.cutout is 8 but dsaux\.data\.augment is false.*or cutout to 0",
        ),
        ({"rand_augment": 3, "augment": False}, r"rand_augment is 3 but .*augment is false.*or rand_augment to 0"),
        ({"cutout": 33}, r"cutout is 33, more than the image's side of 32.*Set it to 16 or so"),
    ],
)
def test_keys_without_effect_or_sense_are_refused(name, changes, says):
    with pytest.raises(ConfigError, match=says):
        check_dataset(DataConfig(name=name, loader="torch", **changes))


@pytest.mark.parametrize("name", ["photos", "synthetic"])
def test_keys_at_their_edges_are_fine(name):
    check_dataset(DataConfig(name=name, loader="torch", cutout=32, rand_augment=10))
    check_dataset(DataConfig(name=name, loader="torch", augment=False))
