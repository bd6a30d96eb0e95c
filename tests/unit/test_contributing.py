"""CONTRIBUTING.md says what is true: its table has every file, its list each that leans on DeepSpeed's insides."""

from __future__ import annotations

import ast
import fnmatch
import inspect
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.pipe.engine import PipelineEngine
from deepspeed.runtime.pipe.module import PipelineModule
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch import nn

ROOT = Path(__file__).resolve().parent.parent.parent
PAGE = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
OWN_NAMES = {"_build", "_lock"}
"""Names of ours that DeepSpeed's classes have by chance."""


def deepspeeds_names() -> set[str]:
    """What no user of DeepSpeed is meant to touch: private names of the classes that dsaux extends or reads."""
    found = {"pipe_buffers"}
    for owner in (PipelineEngine, PipelineModule, DeepSpeedZeroOptimizer, BF16_Optimizer):
        for base in owner.__mro__:
            if base.__module__.startswith("deepspeed."):
                found |= {*vars(base), *re.findall(r"\bself\.(_\w+)", inspect.getsource(base))}
    private = {name for name in found if name.startswith("_") and not name.startswith("__")}
    return (private | {"pipe_buffers"}) - set(dir(nn.Module)) - OWN_NAMES


def used_names(path: Path) -> Iterator[str]:
    """Names that a file reads, writes, overrides, or has in a string, of whatever object."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Attribute):
            yield node.attr
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value
        elif isinstance(node, ast.ClassDef):
            yield from (each.name for each in node.body if isinstance(each, ast.FunctionDef))


def leaning_files() -> dict[str, set[str]]:
    """Files of dsaux that use DeepSpeed's private names, with the names."""
    private = deepspeeds_names()
    files = {path: private & set(used_names(path)) for path in (ROOT / "dsaux").rglob("*.py")}
    return {path.relative_to(ROOT / "dsaux").as_posix(): names for path, names in files.items() if names}


def test_the_list_has_the_files_that_use_deepspeeds_private_names() -> None:
    (sentence,) = re.findall(r"^DeepSpeed's private names stay in (.*?);", PAGE, flags=re.MULTILINE | re.DOTALL)
    # bootstrap.py lends deepspeed.initialize our engine: a module-level name, not a private one
    assert set(re.findall(r"`(.*?)`", sentence)) == {*leaning_files(), "bootstrap.py"}


def test_each_private_name_in_use_is_held_by_the_contract_test() -> None:
    contract = (ROOT / "tests/unit/test_deepspeed_contract.py").read_text(encoding="utf-8")
    names = {name for names in leaning_files().values() for name in names}
    assert sorted(name for name in names if not re.search(rf"\b{name}\b", contract)) == []


@pytest.mark.parametrize("folder", ["dsaux", "benchmarks"])
def test_the_table_has_every_file(folder: str) -> None:
    table = "\n".join(line for line in PAGE.splitlines() if line.startswith("| `"))
    patterns = {Path(name).name for name in re.findall(r"`([\w/*.]+\.py)`", table)}
    files = {path.name for path in (ROOT / folder).glob("*.py")} - {"__init__.py"}
    assert sorted(name for name in files if not any(fnmatch.fnmatch(name, each) for each in patterns)) == []
