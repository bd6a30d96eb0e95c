"""Damaged run folders; a run goes on from the checkpoint before, or says what is wrong.


`python -m tests.fuzz --checkpoints 200` and test_checkpoints.py run them. Damage comes in two kinds. *Blind* damage,
as a disk or a dead process leaves it, must be recognised: the run goes on from the checkpoint before, or ends with one
clear error where there is none. *Forged* damage has a manifest that fits it, so nobody can recognise it: the run may
go on or refuse, but never with a traceback, and never by executing what the file holds.
"""

from __future__ import annotations

import hashlib
import json
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dsaux.checkpoint import MANIFEST_FILE, SEAL_FILE

STEPS = (4, 8, 12)
"""Steps whose checkpoints the base run keeps; two epochs of 6 steps."""
EXECUTED = "a checkpoint was executed"


class Trap:
    """An object whose loading runs code."""

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return print, (EXECUTED,)


@dataclass(frozen=True)
class Damage:
    """A damaged folder.

    Attributes:
        changes: what was done, in words.
        expects: step that the run must go on from; None where it must refuse; -1 where both are fine.
    """

    changes: tuple[str, ...]
    expects: int | None


def damage(run_dir: Path, *, seed: int, number: int) -> Damage:
    """Damage a run folder; the same seed and number do the same.

    Args:
        run_dir: a copy of the base run, which is changed.
        seed: of the damages.
        number: which one.
    """
    chance = random.Random(f"{seed}/{number}")
    folder = run_dir / "checkpoint"
    if chance.random() < 0.3:
        step = STEPS[-1]
        return Damage((f"step {step}: {_forge(folder / _name(step), chance)}",), -1)
    # Damage one, two or all checkpoints, the newest first.
    count = chance.choice((1, 1, 1, 2, 2, 3))
    changes = [f"step {step}: {_blind(folder / _name(step), chance)}" for step in reversed(STEPS[-count:])]
    if chance.random() < 0.3:
        changes.append(_damage_latest(folder, chance))
    return Damage(tuple(changes), None if count == len(STEPS) else STEPS[-1 - count])


def _name(step: int) -> str:
    return f"step_{step:08d}"


# ---- blind ----------------------------------------------------------------------------------------------------------


def _blind(path: Path, chance: random.Random) -> str:
    file = chance.choice(sorted(path.iterdir()))
    change = chance.choice(
        (_cut, _flip, _empty, _remove, _lengthen, _overwrite, _swap, _replace_by_folder, _zero_block)
    )
    return f"{change.__name__.strip('_')} {file.name}{change(file, chance)}"


def _cut(file: Path, chance: random.Random) -> str:
    data = file.read_bytes()
    size = chance.randrange(len(data))
    file.write_bytes(data[:size])
    return f" to {size} bytes"


def _flip(file: Path, chance: random.Random) -> str:
    data = bytearray(file.read_bytes())
    place = chance.randrange(len(data))
    data[place] ^= 1 << chance.randrange(8)
    file.write_bytes(data)
    return f" at byte {place}"


def _empty(file: Path, chance: random.Random) -> str:
    file.write_bytes(b"")
    return ""


def _remove(file: Path, chance: random.Random) -> str:
    file.unlink()
    return ""


def _lengthen(file: Path, chance: random.Random) -> str:
    file.write_bytes(file.read_bytes() + chance.randbytes(chance.randint(1, 100)))
    return ""


def _overwrite(file: Path, chance: random.Random) -> str:
    file.write_bytes(chance.randbytes(file.stat().st_size))
    return ""


def _swap(file: Path, chance: random.Random) -> str:
    others = [other for other in sorted(file.parent.iterdir()) if other.read_bytes() != file.read_bytes()]
    other = chance.choice(others)
    first, second = file.read_bytes(), other.read_bytes()
    file.write_bytes(second)
    other.write_bytes(first)
    return f" with {other.name}"


def _replace_by_folder(file: Path, chance: random.Random) -> str:
    file.unlink()
    file.mkdir()
    return ""


def _zero_block(file: Path, chance: random.Random) -> str:
    data = bytearray(file.read_bytes())
    start = chance.randrange(len(data))
    block = data[start : start + 512]
    data[start : start + 512] = bytes(len(block)) if any(block) else b"\1" * len(block)
    file.write_bytes(data)
    return f" at byte {start}"


def _damage_latest(folder: Path, chance: random.Random) -> str:
    latest = folder / "latest"
    choice = chance.choice(("gone", "empty", "nonsense", "binary", "another"))
    match choice:
        case "gone":
            latest.unlink()
        case "empty":
            latest.write_bytes(b"")
        case "nonsense":
            latest.write_text("../../../etc/passwd")
        case "binary":
            latest.write_bytes(b"\xff\xfe\x00")
        case "another":
            latest.write_text("step_99999999\n")
    return f"latest: {choice}"


# ---- forged ---------------------------------------------------------------------------------------------------------


def _forge(path: Path, chance: random.Random) -> str:
    files = sorted(item.name for item in path.iterdir() if item.suffix == ".pt")
    choice = chance.choice(("manifest", "state", "state", "state", "trap", "text"))
    if choice == "manifest":
        return _forge_manifest(path, chance)
    name = chance.choice(files)
    if choice == "trap":
        torch.save({"weight": Trap()}, path / name)
        words = f"{name}: code instead of numbers"
    elif choice == "text":
        (path / name).write_text("not a file of PyTorch's\n")
        words = f"{name}: text"
    else:
        state = torch.load(path / name, weights_only=True)
        words = f"{name}: {_mutate(state, chance)}"
        torch.save(state, path / name)
    _reseal(path)
    return f"forged {words}"


def _mutate(state: Any, chance: random.Random) -> str:
    """Change one entry somewhere in nested dicts; returns where and how."""
    where = []
    block = state
    while True:
        key = chance.choice(list(block))
        where.append(str(key))
        if not (isinstance(block[key], dict) and block[key]) or chance.random() < 0.2:
            break
        block = block[key]
    choice = chance.choice(("gone", "none", "text", "number", "shape", "list", "nan"))
    value = block[key]
    if choice == "gone":
        del block[key]
    elif choice == "shape" and isinstance(value, torch.Tensor):
        block[key] = value.flatten()[: max(1, value.numel() // 2)].clone()
    elif choice == "nan" and isinstance(value, torch.Tensor) and value.is_floating_point():
        block[key] = torch.full_like(value, float("nan"))
    else:
        block[key] = {"text": "text", "number": -7, "list": [1, 2]}.get(choice)
    return f"{'/'.join(where)} {choice}"


def _forge_manifest(path: Path, chance: random.Random) -> str:
    document = json.loads((path / MANIFEST_FILE).read_text())
    key = chance.choice([*document, "layout/bounds", "layout/stages", "config/dsaux"])
    block = document
    *outer, inner = key.split("/")
    for name in outer:
        block = block[name]
    choice = chance.choice(("gone", "none", "text", "negative", "huge", "list"))
    if choice == "gone":
        del block[inner]
    else:
        block[inner] = {"none": None, "text": "text", "negative": -1, "huge": 10**30, "list": [1, None]}[choice]
    data = json.dumps(document).encode()
    (path / MANIFEST_FILE).write_bytes(data)
    (path / SEAL_FILE).write_text(f"{hashlib.sha256(data).hexdigest()}  {MANIFEST_FILE}\n")
    return f"forged {MANIFEST_FILE}: {key} {choice}"


def _reseal(path: Path) -> None:
    """A manifest that fits the files as they are."""
    document = json.loads((path / MANIFEST_FILE).read_text())
    for entry in document["files"]:
        data = (path / entry["name"]).read_bytes()
        entry.update(size_bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
    data = json.dumps(document).encode()
    (path / MANIFEST_FILE).write_bytes(data)
    (path / SEAL_FILE).write_text(f"{hashlib.sha256(data).hexdigest()}  {MANIFEST_FILE}\n")


def copy_of(base: Path, folder: Path) -> Path:
    """A copy of the base run."""
    shutil.copytree(base, folder)
    return folder
