"""Rules for one value of the configuration, and the errors that name the mend.

First step of a run's path: `dsaux.config` gives every key a `Rule`, `dsaux.ds_keys` does so for DeepSpeed's
own keys, and the functions here hold a JSON document against them. Nothing in this file knows a key by name.
"""

from __future__ import annotations

import difflib
import json
import math
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

_MANY_KEYS = 16
_LONGEST = 80  # characters of a value or a key in an error
_DEEPEST = 32  # blocks and lists in one another; DeepSpeed's own go down to four


class ConfigError(ValueError):
    """A user's setting is wrong: one line that says what was given, what is allowed and what to change."""


@dataclass(frozen=True)
class Rule:
    """What one key may hold.

    Attributes:
        kind: "flag" (true or false), "int", "size" (a whole number, 5e8 too), "number", "text", "texts" (list
            of strings), "pair" (list of two numbers, each in range), "block" (a nested object) or "any"
            (checked elsewhere).
        low: least number allowed, itself included unless `open_low`.
        high: greatest number allowed, itself included unless `open_high`.
        open_low: `low` itself is refused.
        open_high: `high` itself is refused.
        choices: the only values allowed, if any are listed.
        also: strings allowed besides what `kind` says, such as "auto".
        null: null is allowed.
        or_function: a string with a colon is allowed besides, a user's own file.py:function.
        keys: rules of the keys inside a block.
        refused: reason and mend; set for a key that is known but cannot be used. Every value but those in
            `unless` is refused.
        unless: values of a refused key that change nothing and are let through.
        text: description that replaces the generated one.
    """

    kind: str
    low: float | None = None
    high: float | None = None
    open_low: bool = False
    open_high: bool = False
    choices: tuple[Any, ...] = ()
    also: tuple[str, ...] = ()
    null: bool = False
    or_function: bool = False
    keys: Mapping[str, Rule] = field(default_factory=dict)
    refused: str = ""
    unless: tuple[Any, ...] = ()
    text: str = ""

    def describe(self) -> str:
        """Says in words what the rule allows, such as "a whole number >= 1"."""
        if self.text:
            return self.text
        if self.choices:
            words = "one of " + ", ".join(show(choice) for choice in self.choices)
        else:
            words = _KIND_WORDS[self.kind] + self._range_words()
        words += "".join(f" or {show(word)}" for word in self.also)
        words += " or a function of yours, file.py:function" if self.or_function else ""
        return words + (" or null" if self.null else "")

    def _range_words(self) -> str:
        bounds = []
        if self.low is not None:
            bounds.append(f"{'>' if self.open_low else '>='} {self.low:g}")
        if self.high is not None:
            bounds.append(f"{'<' if self.open_high else '<='} {_short(self.high)}")
        return " " + " and ".join(bounds) if bounds else ""

    def _in_range(self, value: float) -> bool:
        if self.low is not None and (value < self.low or (self.open_low and value == self.low)):
            return False
        return not (self.high is not None and (value > self.high or (self.open_high and value == self.high)))

    def allows(self, value: Any) -> bool:
        """Tells whether `value` (a plain JSON value) keeps the rule; keys inside a block are not looked"
        " at."""
        if value is None:
            return self.null or self.kind == "any"
        if isinstance(value, str) and value in self.also:
            return True
        if self.or_function and isinstance(value, str) and ":" in value:
            return True
        if self.choices:
            # type and value: true is not 1, and 1.0 is not 1 where a whole number is asked for
            return any(type(value) is type(choice) and value == choice for choice in self.choices)
        return self._right_kind(value)

    def _right_kind(self, value: Any) -> bool:
        match self.kind:
            case "any":
                return True
            case "flag":
                return isinstance(value, bool)
            case "int":
                return _is_int(value) and self._in_range(value)
            case "size":
                whole = _is_int(value) or (isinstance(value, float) and value.is_integer())
                return whole and self._in_range(value)
            case "number":
                return _is_number(value) and self._in_range(value)
            case "text":
                return isinstance(value, str)
            case "texts":
                return isinstance(value, list) and all(isinstance(item, str) for item in value)
            case "pair":
                return (
                    isinstance(value, list)
                    and len(value) == 2
                    and all(_is_number(v) and self._in_range(v) for v in value)
                )
            case "block":
                return isinstance(value, dict)
        raise AssertionError(f"no such kind of rule: {self.kind}")


_KIND_WORDS: Mapping[str, str] = {
    "any": "a JSON value",
    "flag": "true or false",
    "int": "a whole number",
    "size": "a whole number",
    "number": "a number",
    "text": "a string",
    "texts": "a list of strings",
    "pair": "a list of two numbers, each",
    "block": "a JSON object {...}",
}


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return abs(value) <= sys.float_info.max  # false for NaN, infinities, and whole numbers that no float can hold


def _short(number: float) -> str:
    return str(int(number)) if float(number).is_integer() and abs(number) < 1e15 else f"{number:g}"


def show(value: Any) -> str:
    """Writes a value as JSON for an error message, shortened when long."""
    try:
        text = json.dumps(value)
    except (TypeError, ValueError):
        text = repr(value)
    return text if len(text) <= _LONGEST else text[: _LONGEST - 4] + " ..."


def nearest(name: str, allowed: Iterable[str]) -> str | None:
    """Returns the allowed name that looks most like `name`, letter case aside, or None if none does."""
    lowered = {candidate.lower(): candidate for candidate in allowed}
    found = difflib.get_close_matches(name.lower(), list(lowered), n=1, cutoff=0.6)
    return lowered[found[0]] if found else None


def suggestion(name: str, allowed: Iterable[str]) -> str:
    """Words for the end of an error about a wrong name: the nearest allowed name, or all of them."""
    names = list(allowed)
    close = nearest(name, names)
    listing = f"Allowed: {', '.join(names)}."
    if close is None:
        return listing
    return f"Did you mean {close}?" + (f" {listing}" if len(names) <= _MANY_KEYS else "")


def join(path: str, key: str) -> str:
    """Returns the dotted path of `key` inside the block at `path` ("" is the top level); an odd key in quotes."""
    is_plain = key.isprintable() and key == key.strip() and 0 < len(key) <= _LONGEST
    name = key if is_plain else show(key)
    return f"{path}.{name}" if path else name


def check_value(path: str, value: Any, rule: Rule, *, default: str = "DeepSpeed's default") -> None:
    """Holds one value, and what lies inside it if it is a block, against its rule.

    Raises:
        ConfigError: names `path`, the value, what is allowed and the mend.
    """
    if rule.refused:
        if not any(type(value) is type(fine) and value == fine for fine in rule.unless):
            raise ConfigError(f"{path} is {show(value)}, which dsaux does not support: {rule.refused}")
        return
    if not rule.allows(value):
        hint = ""
        if isinstance(value, str) and rule.choices:
            close = nearest(value, [choice for choice in rule.choices if isinstance(choice, str)])
            hint = f"Did you mean {show(close)}? " if close else ""
        way_out = f", or leave it out for {default}" if default else ""
        raise ConfigError(f"{path} is {show(value)}; it must be {rule.describe()}. {hint}Change it{way_out}.")
    if isinstance(value, dict) and rule.keys:
        check_block(path, value, rule.keys)


def check_names(path: str, block: Iterable[str], allowed: Iterable[str]) -> None:
    """Refuses the first name in `block` that is not among `allowed`.

    Raises:
        ConfigError: names the key and the nearest allowed one.
    """
    names = list(allowed)
    for key in block:
        if key not in names:
            where = path if path else "the top level"
            raise ConfigError(f"{join(path, key)} is not a known key of {where}. {suggestion(key, names)}")


def check_block(path: str, block: Mapping[str, Any], rules: Mapping[str, Rule]) -> None:
    """Checks every key of a block: known, usable, and its value within the rule.

    Raises:
        ConfigError: as `check_value`, or for a key that is not in `rules`, with the nearest usable one.
    """
    usable = [key for key, rule in rules.items() if not rule.refused]
    check_names(path, [key for key in block if key not in rules], usable)
    for key, value in block.items():
        check_value(join(path, key), value, rules[key])


def plain_copy(value: Any, path: str) -> Any:
    """Deep copy of a JSON-like value as dicts, lists, strings, numbers, booleans and None.

    Raises:
        ConfigError: for NaN, an infinity or a whole number beyond 64 bits, text that UTF-8 cannot hold, a key that
            is no string, an object that JSON cannot hold, or blocks and lists that lie too deep in one another.
    """
    return _plain_copy(value, path, depth=0)


def _plain_copy(value: Any, path: str, *, depth: int) -> Any:
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return _encodable(value, path)
    if isinstance(value, (int, float)):
        return _finite(value, path)
    if depth > _DEEPEST:
        raise ConfigError(f"{path[:_LONGEST]} ... lies more than {_DEEPEST} blocks or lists deep. Remove it.")
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise ConfigError(
                    f"{join(path, str(key))} has the key {key!r}; keys must be strings. Write it in quotes."
                )
            _encodable(key, join(path, key))
        return {key: _plain_copy(item, join(path, key), depth=depth + 1) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain_copy(item, f"{path}[{index}]", depth=depth + 1) for index, item in enumerate(value)]
    raise ConfigError(
        f"{path} is a {type(value).__name__}, which JSON cannot hold. Use numbers, strings, lists and objects."
    )


def _finite(number: float, path: str) -> float:
    if isinstance(number, int):
        if not -(2**63) <= number < 2**63:
            raise ConfigError(
                f"{path} is {show(number)}, which 64 bits cannot hold as a whole number. Give a smaller one, or"
                " write it with a point or an exponent."
            )
    elif not math.isfinite(number):
        raise ConfigError(
            f"{path} is {number}, which is not a finite number. Give a finite number, or leave the key out."
        )
    return number


def _encodable(text: str, path: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(
            f"{path} holds {show(text[error.start])}, half of a pair of surrogates, which no file or terminal can"
            " write. Give the whole character."
        ) from error
    return text
