"""Rules for single values: what they allow, how they say it, and the nearest name of a misspelt one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from dsaux.config_rules import (
    ConfigError,
    Rule,
    check_block,
    check_names,
    check_value,
    join,
    nearest,
    plain_copy,
    show,
    suggestion,
)

NAN, INFINITY = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("rule", "allowed", "refused"),
    [
        (Rule("flag"), [True, False], [0, 1, None, "true"]),
        (Rule("int"), [0, -3, 10**20], [True, 1.0, "1", None, [1]]),
        (Rule("int", low=1, high=3), [1, 2, 3], [0, 4]),
        (Rule("int", low=1, null=True), [1, None], [0]),
        (Rule("int", also=("auto",)), [1, "auto"], ["Auto", "none"]),
        (Rule("size", low=0), [0, 5e8, 7], [0.5, -1, True, "5e8"]),
        (Rule("number"), [0, 1.5, -2], [NAN, INFINITY, -INFINITY, 10**400, True, "1", None]),
        (Rule("number", low=0, open_low=True), [1e-9, 1], [0, 0.0, -1]),
        (Rule("number", low=0, high=1, open_high=True), [0, 0.999], [1, 1.0, -0.1]),
        (Rule("text"), ["", "a"], [1, None, True, ["a"]]),
        (Rule("text", choices=("a", "b")), ["a", "b"], ["A", "c", 1]),
        (Rule("int", choices=(0, 1)), [0, 1], [2, True, False, 1.0]),
        (Rule("texts"), [[], ["a", "b"]], ["a", [1], None]),
        (
            Rule("pair", low=0, high=1),
            [[0, 1], [0.5, 0.5]],
            [[0.5], [0, 1, 1], [0, 2], [True, 0], "01", None],
        ),
        (Rule("block"), [{}, {"a": 1}], [[], 1, None]),
        (Rule("any"), [None, 1, "a", {}], []),
    ],
)
def test_rule_allows_and_refuses(rule: Rule, allowed: list[Any], refused: list[Any]) -> None:
    assert all(rule.allows(value) for value in allowed)
    assert not any(rule.allows(value) for value in refused)


@pytest.mark.parametrize(
    ("rule", "words"),
    [
        (Rule("flag"), "true or false"),
        (Rule("int", low=1), "a whole number >= 1"),
        (Rule("int", low=0, high=2**32 - 1), "a whole number >= 0 and <= 4294967295"),
        (Rule("number", low=0, open_low=True, null=True), "a number > 0 or null"),
        (Rule("number", high=0.5, open_high=True), "a number < 0.5"),
        (Rule("text", choices=("a", "b")), 'one of "a", "b"'),
        (Rule("int", low=1, also=("auto",)), 'a whole number >= 1 or "auto"'),
        (Rule("any", text="a colour"), "a colour"),
    ],
)
def test_rule_describes_itself(rule: Rule, words: str) -> None:
    assert rule.describe() == words


def test_kind_of_rule_that_does_not_exist_is_our_mistake() -> None:
    with pytest.raises(AssertionError):
        Rule("colour").allows(1)


def test_error_says_value_allowed_values_and_mend() -> None:
    with pytest.raises(ConfigError) as caught:
        check_value("a.b", 0, Rule("int", low=1))
    expected = "a.b is 0; it must be a whole number >= 1. Change it, or leave it out for DeepSpeed's default."
    assert str(caught.value) == expected


def test_error_names_the_nearest_choice() -> None:
    with pytest.raises(ConfigError, match='Did you mean "linear"'):
        check_value("a", "linaer", Rule("text", choices=("log", "linear")))


@pytest.mark.parametrize("value", [False, None, {}, {"enabled": False}])
def test_refused_key_may_be_written_down_as_off(value: Any) -> None:
    check_value("a", value, Rule("any", refused="no.", unless=(False, None, {}, {"enabled": False})))


@pytest.mark.parametrize("value", [True, 0, 1, {"enabled": True}, {"enabled": False, "more": 1}])
def test_refused_key_is_refused_with_its_reason(value: Any) -> None:
    with pytest.raises(ConfigError, match=r"does not support: it is gone\. Remove it\."):
        check_value("a", value, Rule("any", refused="it is gone. Remove it.", unless=(False, {"enabled": False})))


def test_block_is_checked_at_every_depth() -> None:
    rules = {"outer": Rule("block", keys={"inner": Rule("block", keys={"count": Rule("int")})})}
    check_block("", {"outer": {"inner": {"count": 3}}}, rules)
    with pytest.raises(
        ConfigError, match=r"^outer\.inner\.cuont is not a known key of outer\.inner\. Did you mean count\?"
    ):
        check_block("", {"outer": {"inner": {"cuont": 3}}}, rules)
    with pytest.raises(ConfigError, match=r"^outer\.inner\.count is 3\.5;"):
        check_block("", {"outer": {"inner": {"count": 3.5}}}, rules)


def test_refused_keys_are_not_suggested() -> None:
    rules = {"elastic": Rule("any", refused="gone."), "plastic": Rule("flag")}
    with pytest.raises(ConfigError, match=r"Did you mean plastic\?"):
        check_block("", {"elastik": True}, rules)


def test_unknown_name_at_the_top_is_said_to_be_there() -> None:
    with pytest.raises(ConfigError, match=r"^x is not a known key of the top level\. Allowed: apple, pear\.$"):
        check_names("", ["apple", "x"], ["apple", "pear"])


@pytest.mark.parametrize(
    ("given", "found"),
    [("bta", "beta"), ("BETA", "beta"), ("gama", "gamma"), ("zzz", None), ("", None)],
)
def test_nearest_name(given: str, found: str | None) -> None:
    assert nearest(given, ["beta", "gamma", "rho"]) == found


def test_long_list_of_names_is_left_out_when_one_is_near() -> None:
    names = [f"name{index}" for index in range(40)]
    assert suggestion("nam3", names) == "Did you mean name3?"
    assert suggestion("zzzz", ["a", "b"]) == "Allowed: a, b."


def test_path_of_a_key() -> None:
    assert join("", "a") == "a"
    assert join("a.b", "c") == "a.b.c"


@pytest.mark.parametrize(
    ("key", "shown"),
    [("", '""'), ("a ", '"a "'), ("a\nb", '"a\\nb"'), ("\x1b[2J", '"\\u001b[2J"'), ("Ω", "Ω"), ("k" * 80, "k" * 80)],
)
def test_odd_key_stands_in_quotes(key: str, shown: str) -> None:
    assert join("a", key) == f"a.{shown}"


def test_long_key_is_shortened() -> None:
    with pytest.raises(ConfigError) as caught:
        check_names("a", ["k" * 20_000], ["b"])
    assert str(caught.value) == f'a."{"k" * 75} ... is not a known key of a. Allowed: b.'


def test_long_value_is_shortened_in_an_error() -> None:
    assert show([1, "a", None]) == '[1, "a", null]'
    assert show("x" * 500).endswith(" ...")
    assert len(show("x" * 500)) <= 80
    assert show({1, 2}) == "{1, 2}"


def test_plain_copy_is_deep_and_turns_tuples_into_lists() -> None:
    inner = {"a": (1, 2)}
    copied = plain_copy({"b": inner, "c": [None, True, 1.5, 2**63 - 1, "d"]}, "")
    assert copied == {"b": {"a": [1, 2]}, "c": [None, True, 1.5, 2**63 - 1, "d"]}
    assert copied["b"] is not inner


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ({"a": {"b": NAN}}, "a.b is nan"),
        ({"a": [1, INFINITY]}, r"a\[1\] is inf"),
        ({"a": -(10**400)}, r"a is -1000.* \.\.\., which 64 bits cannot hold"),
        ({"a": 2**63}, "a is 9223372036854775808, which 64 bits cannot hold"),
        ({1: 2}, "keys must be strings"),
        ({"a": object()}, "a is a object"),
        ({"a": {1, 2}}, "a is a set"),
        ({"a": ["\ud800"]}, r'a\[0\] holds "\\ud800", half of a pair of surrogates'),
        ({"b\udfffc": 1}, r'"b\\udfffc" holds "\\udfff"'),
    ],
)
def test_what_json_cannot_hold_is_refused_with_its_path(value: Any, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        plain_copy(value, "")


@pytest.mark.parametrize("wrap", [lambda inner: [inner], lambda inner: {"a": inner}], ids=["lists", "blocks"])
def test_depth_of_a_document_has_an_end(wrap: Callable[[Any], Any]) -> None:
    def nested(depth: int) -> Any:
        value: Any = 1
        for _ in range(depth):
            value = wrap(value)
        return value

    assert plain_copy(nested(30), "top") == nested(30)
    with pytest.raises(ConfigError, match="lies more than 32 blocks or lists deep"):
        plain_copy(nested(500), "top")
