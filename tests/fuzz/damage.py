"""Damaged text: what becomes of a JSON file that was cut off, mistyped or written by another program.

`tests.fuzz.configs` draws from `DAMAGES`. All but `another_byte` make a file that must be refused.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable


def cut_off(chance: random.Random, content: bytes) -> bytes:
    return content[: chance.randrange(len(content))]


def byte_order_mark(chance: random.Random, content: bytes) -> bytes:
    return b"\xef\xbb\xbf" + content


def utf_16(chance: random.Random, content: bytes) -> bytes:
    return content.decode("utf-8", "replace").encode(chance.choice(("utf-16", "utf-16-be")))


def no_utf_8(chance: random.Random, content: bytes) -> bytes:
    place = chance.randrange(len(content))
    return content[:place] + chance.choice((b"\xff", b"\xc3", b"\xed\xa0\x80")) + content[place:]


def comma_too_many(chance: random.Random, content: bytes) -> bytes:
    place = chance.choice([found.start() for found in re.finditer(rb"[}\]]", content)])
    return content[:place] + b"," + content[place:]


def comma_too_few(chance: random.Random, content: bytes) -> bytes:
    place = chance.choice([found.start() for found in re.finditer(rb",", content)])
    return content[:place] + b" " + content[place + 1 :]


def key_twice(chance: random.Random, content: bytes) -> bytes:
    place, name = chance.choice([(found.start(), found[0]) for found in re.finditer(rb'"\w+": ', content)])
    return content[:place] + name + chance.choice((b"1, ", b"{}, ", b"null, ")) + content[place:]


def deep_nesting(chance: random.Random, content: bytes) -> bytes:
    depth = chance.choice((40, 300, 700, 2_000, 10**6))
    opening, closing = chance.choice(((b"[", b"]"), (b'{"a":', b"}")))
    nested = opening * depth + b"0" + closing * depth
    return chance.choice((nested, content[:-1].rstrip() + b', "x": ' + nested + b"}"))


def other_than_an_object(chance: random.Random, content: bytes) -> bytes:
    return chance.choice((b"", b" \n", b"null", b"[]", b"{}", b"3", b'"text"', b"NaN", b"\0", b"[" + content + b"]"))


def two_documents(chance: random.Random, content: bytes) -> bytes:
    return content + chance.choice((b"", b",", b"\n")) + content


def comment(chance: random.Random, content: bytes) -> bytes:
    return chance.choice((b"// x\n", b"# x\n", b"/* x */")) + content


def other_quotes(chance: random.Random, content: bytes) -> bytes:
    return content.replace(b'"', b"'")


def many_digits(chance: random.Random, content: bytes) -> bytes:
    return content.replace(b"16", b"1" * 5_000, 1)


def control_character(chance: random.Random, content: bytes) -> bytes:
    return content.replace(b'"dsaux"', b'"ds' + chance.choice((b"\0", b"\n", b"\x1b")) + b'aux"')


def another_byte(chance: random.Random, content: bytes) -> bytes:
    place = chance.randrange(len(content))
    return content[:place] + chance.choice(b'019-."{}[]:,eExn \\').to_bytes() + content[place + 1 :]


DAMAGES: tuple[Callable[[random.Random, bytes], bytes], ...] = (
    cut_off,
    byte_order_mark,
    utf_16,
    no_utf_8,
    comma_too_many,
    comma_too_few,
    key_twice,
    deep_nesting,
    other_than_an_object,
    two_documents,
    comment,
    other_quotes,
    many_digits,
    control_character,
    another_byte,
    another_byte,
)
