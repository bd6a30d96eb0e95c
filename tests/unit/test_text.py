"""The data set "text": its symbols, blocks, labels and draws, and what is refused."""

from __future__ import annotations

import sys
import types
from dataclasses import replace

import numpy as np
import pytest
import torch

from dsaux.config import ConfigError, DataConfig, check_launch, config_from_dict
from dsaux.data import ReplicaStream, check_dataset, dataset_facts, load_dataset, sample_counts, test_batches
from dsaux.data.text import SYMBOLS, UNKNOWN, TextDataset, read_text
from dsaux.evaluate import classification_sums

DATA = DataConfig(name="text", loader="torch", context=16)


def stream(dataset: TextDataset, *, augment: bool, replica: int = 0, replicas: int = 1) -> ReplicaStream:
    return ReplicaStream(
        dataset,
        loader="torch",
        seed=3,
        replica=replica,
        num_replicas=replicas,
        micro_batch_size=8 // replicas,
        micro_batches_per_step=1,
        device="cpu",
        augment=augment,
    )


@pytest.fixture(scope="module")
def dataset() -> TextDataset:
    return load_dataset(DATA)


def text_of(numbers: torch.Tensor) -> str:
    return "".join("?" if number == 0 else SYMBOLS[number] for number in numbers.tolist())


def test_the_text_is_pythons_documentation_in_a_fixed_order(dataset: TextDataset) -> None:
    text = read_text()
    assert len(text) > 200_000
    known = "".join(symbol if symbol in SYMBOLS else "?" for symbol in text)
    both = np.concatenate([dataset.train_text, dataset.test_text])
    assert text_of(torch.from_numpy(both)) == known
    assert len(dataset.test_text) == len(text) // 10
    assert known.count("?") < 0.01 * len(known) + text.count("?")
    assert len(dataset.digest) == 64
    assert load_dataset(DATA).digest == dataset.digest


def test_the_order_does_not_depend_on_that_of_the_dict(monkeypatch: pytest.MonkeyPatch) -> None:
    topics = {"b": "second", "a": "first"}
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", types.SimpleNamespace(topics=topics))
    assert read_text() == "first\nsecond\n"


def test_facts_without_reading_are_those_of_the_data(dataset: TextDataset) -> None:
    facts = dataset_facts(DATA)
    assert facts.num_classes == dataset.num_classes == 97
    assert facts.input_spec == dataset.input_spec
    assert sample_counts(DATA) == (dataset.num_train, dataset.num_test)
    assert dataset.input_spec.shape == (16,)
    assert dataset.input_spec.unit == "tokens"
    assert dataset.classes[0] == UNKNOWN


@pytest.mark.parametrize("augment", [True, False])
def test_labels_are_the_next_characters(dataset: TextDataset, augment: bool) -> None:
    train = text_of(torch.from_numpy(dataset.train_text))
    inputs, labels = next(stream(dataset, augment=augment))
    assert inputs.shape == labels.shape == (8, 16)
    assert inputs.dtype == labels.dtype == torch.int64
    assert torch.equal(inputs[:, 1:], labels[:, :-1])
    for row, following in zip(inputs, labels, strict=True):
        assert text_of(row) + text_of(following[-1:]) in train


def test_blocks_start_at_their_places_or_somewhat_later(dataset: TextDataset) -> None:
    rows = {augment: next(stream(dataset, augment=augment))[0] for augment in (True, False)}
    blocks = torch.from_numpy(dataset.train_text[: dataset.num_train * 16].astype(np.int64)).reshape(-1, 16)
    is_block = {augment: [(blocks == row).all(dim=1).any().item() for row in rows[augment]] for augment in rows}
    assert all(is_block[False])
    assert not all(is_block[True])


def test_an_epoch_holds_every_block_once() -> None:
    small = load_dataset(replace(DATA, train_samples=24))
    reader = stream(small, augment=False)
    seen = torch.cat([next(reader)[0] for _ in range(3)])
    blocks = torch.from_numpy(small.train_text[: 24 * 16].astype(np.int64)).reshape(-1, 16)
    assert sorted(seen.tolist()) == sorted(blocks.tolist())


def test_last_block_with_the_largest_offset_stays_in_the_text(dataset: TextDataset) -> None:
    from dsaux.data.stream import Rows
    from dsaux.data.text import TextLoader

    class Last:
        def rows(self, position: int) -> Rows:
            return Rows(np.array([dataset.num_train - 1]), np.array([True]), {"offset": np.array([15])})

    inputs, labels = TextLoader(dataset.train_text, Last(), context=16, device=torch.device("cpu")).load()
    assert labels[0, -1] == dataset.train_text[-1]
    assert torch.equal(inputs[0, 1:], labels[0, :-1])


def test_the_same_stream_whatever_the_replicas_and_wherever_it_goes_on(dataset: TextDataset) -> None:
    whole = next(stream(dataset, augment=True))[0]
    parts = [next(stream(dataset, augment=True, replica=replica, replicas=2))[0] for replica in (0, 1)]
    assert torch.equal(torch.cat(parts), whole)
    reader, other = stream(dataset, augment=True), stream(dataset, augment=True)
    for _ in range(5):
        expected = next(reader)[0]
    other.seek(4)
    assert torch.equal(next(other)[0], expected)


def test_every_test_character_counts_once() -> None:
    small = load_dataset(replace(DATA, test_samples=7))
    batches = [
        batch
        for replica in (0, 1)
        for batch in test_batches(small, loader="torch", replica=replica, num_replicas=2, batch_size=3, device="cpu")
    ]
    assert {tuple(inputs.shape) for inputs, _ in batches} == {(3, 16)}
    total = sum(classification_sums(torch.zeros(*labels.shape, 97), labels) for _, labels in batches)
    assert total[3] == 7 * 16
    assert total[0] / total[3] == pytest.approx(np.log(97), rel=1e-6)  # float32 sums


def test_sums_per_token_are_those_of_the_tokens_one_by_one() -> None:
    generator = torch.Generator().manual_seed(0)
    scores, labels = torch.randn(3, 4, 7, generator=generator), torch.randint(7, (3, 4), generator=generator)
    labels[2] = -1
    flat = classification_sums(scores.reshape(12, 7), labels.reshape(12))
    assert torch.equal(classification_sums(scores, labels), flat)
    assert flat[3] == 8


def test_a_python_without_the_texts_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(ConfigError, match=r"read from Python's own pydoc_data\.topics, but this Python lacks it"):
        check_dataset(DATA)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"loader": "dali"}, r'loader is "dali" but .* Set dsaux\.data\.loader to "torch"'),
        ({"workers": 2}, r"workers is 2 but text is cut"),
        ({"root": "/data"}, r"root is \"/data\" but text comes with Python and reads no folder; it would have no"),
        ({"image_size": 16}, r"image_size is 16 but text has no images; it would have no effect"),
        ({"context": 5000}, r"context is 5000; a block may have 4096"),
        ({"train_samples": 10**6}, r"train_samples is 1000000 but the text has \d+ blocks of 16 characters"),
        ({"test_samples": 10**6}, r"test_samples is 1000000 but the text has \d+ blocks"),
        ({"name": "photos", "context": 16}, r"context is 16 but photos holds images; it would have no effect"),
    ],
)
def test_what_does_not_go_with_text_is_refused(change: dict[str, object], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        check_dataset(replace(DATA, **change))


def test_a_network_for_images_is_refused() -> None:
    config = config_from_dict(
        {
            "train_batch_size": 4,
            "optimizer": {"type": "SGD", "params": {"lr": 0.1}},
            "dsaux": {"data": {"name": "text", "loader": "torch"}, "pipeline": {"stages": 1}},
        }
    )
    with pytest.raises(ConfigError, match=r'data\.name is "text" but resnet20 takes images'):
        check_launch(config, world_size=1)
