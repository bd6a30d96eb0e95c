"""Mutated configurations: small runs made of `ds_configs/`, each with a few changes, sensible or not.

`tests.fuzz.runs` trains each of them and judges how it ended. A mutant depends on (seed, number) alone, so that one can
be made again without the others:

    ds_configs/*.json -> shrunk to two steps -> fine settings -> wild or wrong changes -> text, perhaps damaged

A mutant of fine settings alone must train. One with a change that is wrong whatever the rest holds must be refused.
What the others may do depends on the change: they are judged by the output alone.
"""

from __future__ import annotations

import functools
import json
import random
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.fuzz.changes import WILD, WRONG, Document, apply
from tests.fuzz.damage import DAMAGES, another_byte
from tests.fuzz.fine import FINE, Sets

ROOT = Path(__file__).resolve().parents[2]
TRAINED, REFUSED, EITHER = "trained", "refused", "either"


@dataclass(frozen=True)
class Mutant:
    """One configuration.

    Attributes:
        number: its place in the sequence.
        changes: what was done, in words.
        content: the file's bytes.
        overrides: values of --set.
        expects: TRAINED, REFUSED or EITHER.
    """

    number: int
    changes: tuple[str, ...]
    content: bytes
    overrides: tuple[str, ...] = ()
    expects: str = EITHER

    @property
    def document(self) -> Any:
        """What the file holds, overrides left out; None where it is not JSON."""
        try:
            return json.loads(self.content)
        except (ValueError, RecursionError):
            return None

    @property
    def builds_an_operation(self) -> bool:
        """Whether a compiler may run for it, for a minute: for DeepSpeed's fused Adam, or for the network."""
        return re.search(rb'"type": "adamw?"|"compile": true', self.content, re.IGNORECASE) is not None


def make_mutant(seed: int, number: int) -> Mutant:
    """Makes the mutant of this number, the same one whenever it is asked."""
    chance = random.Random(f"{seed}/{number}")
    while True:
        mutant = _draw(chance, number)
        if not _is_long(mutant):
            return mutant


def _draw(chance: random.Random, number: int) -> Mutant:
    base = chance.choice(_bases())
    document = shrunk(base)
    changes, overrides, expects = [base.name], list[str](), EITHER
    kind = chance.choices(("fine", "wild", "wrong", "damaged"), weights=(35, 40, 15, 10))[0]
    changes += [apply(document, sets) for sets in _fine(chance, chance.randint(1, 4) if kind == "fine" else 1)]
    if kind == "fine":
        expects = TRAINED
    elif kind == "wild":
        changes += [chance.choice(WILD)(chance, document, overrides) for _ in range(chance.choice((1, 1, 1, 2, 3)))]
    elif kind == "wrong":
        changes.append(chance.choice(WRONG)(chance, document, overrides))
        expects = REFUSED
    text = json.dumps(document, indent=chance.choice((None, 1, 2)), ensure_ascii=chance.random() < 0.5)
    content = text.encode("utf-8", "surrogatepass")
    if kind == "damaged":
        damage = chance.choice(DAMAGES)
        content = damage(chance, content)
        changes.append(damage.__name__.replace("_", " "))
        expects = EITHER if damage is another_byte else REFUSED
    return Mutant(number, tuple(changes), content, tuple(overrides), expects)


def _fine(chance: random.Random, count: int) -> list[Sets]:
    """Up to `count` groups of sensible settings that set no key twice: the second could make nonsense of the first."""
    chosen: list[Sets] = []
    for sets in (chance.choice(FINE) for _ in range(count)):
        if all(sets.keys().isdisjoint(before) for before in chosen):
            chosen.append(sets)
    return chosen


@functools.cache
def _bases() -> tuple[Path, ...]:
    return tuple(sorted((ROOT / "ds_configs").glob("*.json")))


def shrunk(path: Path) -> Document:
    """The configuration in a file, made small enough to train in a second: one stage, 48 images, two steps."""
    document: Document = json.loads(path.read_text(encoding="utf-8"))
    block = document["dsaux"]
    document["train_batch_size"] = 16
    document["scheduler"]["params"]["warmup_num_steps"] = 1
    document.pop("bf16", None)  # FINE sets it
    block["model"] = {"name": "resnet8"}
    block["data"] = {"name": "photos", **{k: v for k, v in block["data"].items() if k in ("augment", "guard_every")}}
    block["data"].update(loader="torch", train_samples=48, test_samples=20, image_size=8)
    block["pipeline"]["stages"] = 1
    if isinstance(block["pipeline"]["partition"], list):
        block["pipeline"]["partition"] = []
    block["run"].update(epochs=1, max_steps=2, eval_every=0, bn_batches=2, eval_batch_size=16, log_every=1)
    return document


def _is_long(mutant: Mutant) -> bool:
    """Whether it may be a long run that is nobody's mistake: many epochs and no end before."""
    document = mutant.document
    run = document.get("dsaux") if isinstance(document, dict) else None
    run = run.get("run") if isinstance(run, dict) else None
    if not isinstance(run, dict):
        return False
    last = dict(override.split("=", 1) for override in mutant.overrides)
    epochs = last.get("dsaux.run.epochs", run.get("epochs", 10))
    steps = last.get("dsaux.run.max_steps", run.get("max_steps"))
    return epochs not in range(4) and steps not in range(12)
