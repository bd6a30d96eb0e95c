"""Data set "text": the characters of Python's own documentation, `pydoc_data.topics`, to be predicted one by one.

The texts of all topics in alphabetical order, one after the other; the last tenth is the test. A sample is a block of T
characters, its labels are the characters that follow each of them:

    text     h e l p :   t h e       T = 3
    sample   h e l | p :   |  ..
    labels   e l p | :   t |

The symbols are those of ASCII, whatever Python's version has written; the digest tells two texts apart.
"""

from __future__ import annotations

import hashlib
import importlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import numpy as np
from numpy.typing import NDArray

from dsaux.config_rules import ConfigError
from dsaux.data.augment import Draws

if TYPE_CHECKING:
    import torch

    from dsaux.config import DataConfig
    from dsaux.data.augment import Augmentation
    from dsaux.data.stream import Batch, Loader, LoaderSettings, Plan
    from dsaux.models.shapes import SampleSpec

_Text = TypeVar("_Text", str, NDArray[np.uint8])
SOURCE = "pydoc_data.topics"
UNKNOWN = "unknown"
SYMBOLS = (UNKNOWN, "\n", *(chr(code) for code in range(32, 127)))
"""Number 0 stands for every rare character, then the line's end and the printable characters of ASCII."""
TEST_SHARE = 0.1
LONGEST_CONTEXT = 4096


@dataclass(frozen=True)
class BlockOffset:
    """Lets a block start later than its place, by less than its length.

    Attributes:
        context: characters in a block; 1 draws no offset.
    """

    context: int

    def draw(self, rng: np.random.Generator, count: int) -> Draws:
        """`offset`, characters, int64."""
        return {"offset": rng.integers(0, self.context, size=count)}


@dataclass(frozen=True, eq=False)
class TextDataset:
    """Blocks of text in memory; see `dsaux.data.stream.Dataset`.

    Attributes:
        name: name of the data set.
        train_text: numbers of the symbols, uint8, shape (characters,).
        test_text: likewise.
        context: characters in a block, T.
        num_train: training blocks.
        num_test: test blocks.
        digest: SHA-256 of the text that both parts were cut from.
    """

    name: str
    train_text: NDArray[np.uint8]
    test_text: NDArray[np.uint8]
    context: int
    num_train: int
    num_test: int
    digest: str

    @property
    def num_classes(self) -> int:
        """Symbols."""
        return len(SYMBOLS)

    @property
    def classes(self) -> tuple[str, ...]:
        """The symbols themselves."""
        return SYMBOLS

    @property
    def mean(self) -> tuple[float, ...]:
        """There is nothing to normalise."""
        return ()

    @property
    def std(self) -> tuple[float, ...]:
        """There is nothing to normalise."""
        return ()

    @property
    def shorter_side(self) -> None:
        """There are no images."""

    @property
    def input_spec(self) -> SampleSpec:
        """A row of symbols, (T,)."""
        from dsaux.models.shapes import SampleSpec

        return SampleSpec((self.context,), causal=True, vocabulary=len(SYMBOLS))

    def augmentation(self, *, is_on: bool) -> Augmentation:
        """What is drawn for a block: how much later it starts."""
        return BlockOffset(self.context if is_on else 1)

    def train_loader(self, plan: Plan, settings: LoaderSettings, *, augment: bool) -> Loader:
        """Makes the batches of a plan over the training blocks, in this process."""
        return TextLoader(self.train_text, plan, context=self.context, device=settings.device)

    def test_loader(self, plan: Plan, settings: LoaderSettings) -> Loader:
        """Makes the batches of a plan over the test blocks, in this process."""
        return TextLoader(self.test_text, plan, context=self.context, device=settings.device)


class TextLoader:
    """Cuts blocks out of a text: (B, T) int64, and as many labels, below 0 for the padding of an evaluation.

    Args:
        text: numbers of the symbols.
        plan: what each batch is made of.
        context: characters in a block, T.
        device: where the batches are put.
    """

    def __init__(self, text: NDArray[np.uint8], plan: Plan, *, context: int, device: torch.device) -> None:
        self._text, self._plan, self._context, self._device = text, plan, context, device
        self._position = 0

    def seek(self, position: int) -> None:
        """Go on at this position."""
        self._position = position

    def load(self) -> Batch:
        """Returns the next batch; it belongs to the caller."""
        import torch

        rows = self._plan.rows(self._position)
        self._position += 1
        last = len(self._text) - self._context - 1
        starts = np.minimum(rows.indices * self._context + rows.draws["offset"], last)
        blocks = self._text[starts[:, None] + np.arange(self._context + 1)].astype(np.int64)
        labels = np.where(rows.is_real[:, None], blocks[:, 1:], -1)
        inputs = np.ascontiguousarray(blocks[:, :-1])
        return torch.from_numpy(inputs).to(self._device), torch.from_numpy(labels).to(self._device)

    def close(self) -> None:
        """Nothing to end."""


def check_text(data: DataConfig) -> None:
    """Refuses what does not go with text.

    Raises:
        ConfigError: names the key and the mend.
    """
    if data.loader == "dali":
        raise ConfigError(
            'dsaux.data.loader is "dali" but dsaux.data.name is "text": DALI has nothing to do for text. Set'
            ' dsaux.data.loader to "torch".'
        )
    if data.workers:
        raise ConfigError(
            f"dsaux.data.workers is {data.workers} but text is cut into blocks in the training process. Remove it."
        )
    if data.context > LONGEST_CONTEXT:
        raise ConfigError(
            f"dsaux.data.context is {data.context}; a block may have {LONGEST_CONTEXT} characters at most. Lower it."
        )
    text_counts(data)


def text_counts(data: DataConfig) -> tuple[int, int]:
    """Training and test blocks of a run.

    Raises:
        ConfigError: if the text is not there, or has fewer than are asked for.
    """
    train, test = _parts(read_text())
    counts = []
    for key, part, asked in (("train", train, data.train_samples), ("test", test, data.test_samples)):
        there = (len(part) - 1) // data.context
        if asked is not None and asked > there:
            raise ConfigError(
                f"dsaux.data.{key}_samples is {asked} but the text has {there} blocks of {data.context} characters for "
                f"the {key} set. Set it to {there} or less, or to null for all."
            )
        counts.append(there if asked is None else asked)
    return counts[0], counts[1]


def load_text(data: DataConfig) -> TextDataset:
    """The text, cut as the configuration says.

    Raises:
        ConfigError: if the text is not there.
    """
    text = read_text()
    num_train, num_test = text_counts(data)
    table = np.zeros(0x110000, dtype=np.uint8)
    for number, symbol in enumerate(SYMBOLS[1:], start=1):
        table[ord(symbol)] = number
    numbers = table[np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)]
    train, test = _parts(numbers)
    digest = hashlib.sha256(text.encode()).hexdigest()
    return TextDataset(data.name, train, test, data.context, num_train, num_test, digest)


def read_text() -> str:
    """All topics in alphabetical order, a line's end after each.

    Raises:
        ConfigError: if this Python lacks them.
    """
    try:
        topics = importlib.import_module(SOURCE).topics
        return "".join(f"{topics[name]}\n" for name in sorted(topics))
    except (ImportError, AttributeError, TypeError) as error:
        raise ConfigError(
            f'dsaux.data.name is "text", which is read from Python\'s own {SOURCE}, but this Python lacks it ({error}).'
            " Install Python's documentation topics (some systems ship them apart), or take another Python."
        ) from error


def _parts(text: _Text) -> tuple[_Text, _Text]:
    """Training part and test part."""
    cut = len(text) - int(TEST_SHARE * len(text))
    return text[:cut], text[cut:]
