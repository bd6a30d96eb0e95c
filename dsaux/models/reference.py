"""Users' own functions by name: `path/to/file.py:function` or `package.module:function`.

`dsaux.models.custom` finds networks with it, `dsaux.models.auxnet` segments. Imports no PyTorch itself.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from dsaux.config_rules import ConfigError, show, suggestion

_LONGEST_REASON = 300  # characters of a user's exception in an error


def is_reference(name: str) -> bool:
    """Whether a name means a user's own function: it has a colon."""
    return ":" in name


def load_function(reference: str, *, key: str) -> Callable[..., Any]:
    """Import a user's function. A file is imported once in a process, as any module.

    Args:
        reference: `path/to/file.py:function`, the path from the working directory, or `package.module:function`.
        key: the configuration's key that holds it, for errors.

    Raises:
        ConfigError: if the file or module is missing or fails, or has no such function.
    """
    place, _, name = reference.rpartition(":")
    if not place.strip() or not name.isidentifier():
        raise ConfigError(
            f"{key} is {show(reference)}; a function of your own is written path/to/file.py:function or "
            "package.module:function. Change it."
        )
    module = _import_file(reference, Path(place), key) if place.endswith(".py") else _import(reference, place, key)
    function = getattr(module, name, None)
    if function is None:
        there = [entry for entry, value in vars(module).items() if callable(value) and not entry.startswith("_")]
        raise ConfigError(f"{key} is {show(reference)} but {place} has no {name}. {suggestion(name, there)}")
    if not callable(function):
        kind = type(function).__name__
        raise ConfigError(f"{key} is {show(reference)} but {name} is a {kind}. Name a function of {place}.")
    found: Callable[..., Any] = function
    return found


def in_one_line(error: BaseException) -> str:
    """A user's exception, type and message, in one line of bounded length."""
    text = " ".join(str(error).split())
    text = text if len(text) <= _LONGEST_REASON else f"{text[:_LONGEST_REASON]} ..."
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _import(reference: str, place: str, key: str) -> ModuleType:
    try:
        with _also_found_in(Path.cwd()):
            return importlib.import_module(place)
    except Exception as error:
        raise ConfigError(
            f"{key} is {show(reference)} but {place} cannot be imported: {in_one_line(error)}. Mend it, or name "
            "another module."
        ) from error


def _import_file(reference: str, path: Path, key: str) -> ModuleType:
    if not path.is_file():
        raise ConfigError(
            f"{key} is {show(reference)} but there is no file {path} in {Path.cwd()}. Give its path from the working "
            "directory, or an absolute one."
        )
    path = path.resolve()
    # One name for one path: the module can be found again, and two files of one name do not meet.
    name = f"dsaux_user_{path.stem}_{hashlib.blake2b(str(path).encode(), digest_size=6).hexdigest()}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None, "the path ends in .py"
    assert spec.loader is not None, "likewise"
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        with _also_found_in(path.parent):
            spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise ConfigError(
            f"{key} is {show(reference)} but {path} fails when it is imported: {in_one_line(error)}. Mend the file."
        ) from error
    return module


@contextlib.contextmanager
def _also_found_in(folder: Path) -> Iterator[None]:
    """Within the block the modules of a folder can be imported; behind all others, so that it hides none."""
    before = list(sys.path)
    sys.path.append(str(folder))
    try:
        yield
    finally:
        sys.path[:] = before
