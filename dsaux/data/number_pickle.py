"""Reads a pickle of plain data and runs nothing of it: dicts, lists, strings, numbers, and arrays of numbers.

`dsaux.data.cifar` reads files of the python layout with it. A pickle is a program: it may name any function of any
module and call it. Here no name is ever looked up. The few names that a pickled array consists of get stand-ins of
this file, which keep bytes, shape and type; whatever else is named ends the reading.
"""

from __future__ import annotations

import io
import math
import pickle
import re
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

_NUMBER_TYPE = re.compile(r"[biu][1248]")


def load_numbers(raw: bytes) -> Any:
    """Reads a pickle; text of Python 2 stays bytes.

    Args:
        raw: the content of the file.

    Returns:
        What it holds; its arrays are read-only.

    Raises:
        ValueError: if it names something that plain data does not need, or is no whole pickle.
    """
    try:
        return _as_numpy(_Reader(io.BytesIO(raw), encoding="bytes").load())
    except ValueError:
        raise
    except Exception as error:  # whatever a damaged pickle can make the reader stumble on
        raise ValueError(f"it is no whole pickle of numbers ({type(error).__name__}: {error})") from error


class _Type:
    """Stands in for numpy.dtype."""

    def __init__(self, name: Any, *_: Any) -> None:
        self.name = name.decode("ascii") if isinstance(name, bytes) else str(name)
        self.byte_order = "="

    def __setstate__(self, state: Any) -> None:
        order = state[1]
        self.byte_order = {"<": "<", ">": ">"}.get(order.decode("ascii") if isinstance(order, bytes) else order, "=")

    def to_numpy(self) -> np.dtype[Any]:
        if not _NUMBER_TYPE.fullmatch(self.name):
            raise ValueError(f"it holds an array of type {self.name[:20]!r}, where whole numbers are expected")
        return np.dtype(self.byte_order + self.name)


class _Array:
    """Stands in for numpy.ndarray."""

    def __init__(self, *_: Any) -> None:
        self.state: tuple[Any, ...] = ()

    def __setstate__(self, state: Any) -> None:
        self.state = tuple(state)

    def to_numpy(self) -> NDArray[Any]:
        _, shape, kind, is_fortran, raw = self.state
        return _array(raw, kind.to_numpy(), shape, "F" if is_fortran else "C")


def _from_buffer(raw: Any, kind: _Type, shape: Any, order: str) -> _Array:
    """Stands in for what numpy calls in pickles of protocol 5."""
    array = _Array()
    array.state = (1, shape, kind, order == "F", raw)
    return array


def _array(raw: Any, kind: np.dtype[Any], shape: Any, order: Any) -> NDArray[Any]:
    sizes = tuple(int(size) for size in shape)
    if not isinstance(raw, (bytes, bytearray)) or len(raw) != math.prod(sizes) * kind.itemsize:
        raise ValueError(f"it holds an array of shape {sizes} whose bytes are not there")
    return np.frombuffer(bytes(raw), dtype=kind).reshape(sizes, order=order)


def _encoded(text: str, encoding: str) -> bytes:
    """Stands in for _codecs.encode, by which Python 3 writes bytes for Python 2."""
    if encoding not in ("latin1", "latin-1"):
        raise ValueError(f"it asks for the codec {encoding[:20]!r}")
    return text.encode("latin-1")


_STAND_INS: dict[tuple[str, str], Callable[..., Any]] = {
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Type,
    ("_codecs", "encode"): _encoded,
    **{(f"numpy.{core}.multiarray", "_reconstruct"): _Array for core in ("core", "_core")},
    **{(f"numpy.{core}.numeric", "_frombuffer"): _from_buffer for core in ("core", "_core")},
}


class _Reader(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _STAND_INS:
            raise ValueError(f"it names {module}.{name}, which no file of numbers needs, and was not read further")
        return _STAND_INS[module, name]


def _as_numpy(value: Any) -> Any:
    """The stand-ins on the first two levels as arrays."""
    if isinstance(value, _Array):
        return value.to_numpy()
    if isinstance(value, dict):
        return {key: item.to_numpy() if isinstance(item, _Array) else item for key, item in value.items()}
    return value
