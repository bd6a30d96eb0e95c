"""Changes of one key that may be right or wrong (`WILD`), and such that are wrong whatever the rest holds (`WRONG`).

`tests.fuzz.configs` draws from them. A change takes the document and the values of --set, alters one of them and says
what it did.
"""

from __future__ import annotations

import copy
import functools
import json
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from dsaux.config_rules import Rule
from dsaux.ds_keys import TOP_LEVEL_KEYS
from dsaux.ds_optim_keys import DEEPSPEED_OPTIMIZERS, OPTIMIZER_PARAM_RULES, SCHEDULERS, TORCH_OPTIMIZERS
from tests.fuzz.fine import Sets, batch
from tests.fuzz.readme import readme_allows, readme_table

Document = dict[str, Any]

Change = Callable[[random.Random, Document, list[str]], str]

ODD_VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 3, 0.5, 1.0, 1.5, -0.0, 1e-300, 5e-324, 1e16, 1e38, 1e308, -1e308, 2**31,
    2**53 + 1, 2**62, 2**63, -(2**63), 10**40, 10**400, float("nan"), float("inf"), float("-inf"),
    "", " ", "0", "1", "1e-3", "true", "null", "auto", "None", "nan", "SGD", "penalty", "resnet20", "../x", "a/b",
    "x\0y", "\ud800", "\n", "\x1b[31m", "é" * 150, "日本語", "x" * 10_000,
    [], [0], [1, 2], [None], ["a"], [[]], [0.9, 0.999], [1] * 1000,
    {}, {"": 0}, {"enabled": True}, {"type": "SGD"}, {"a": {"b": {"c": []}}},
)  # fmt: skip


def _leaves(block: Mapping[str, Any], path: str = "") -> Iterator[str]:
    """Paths of all keys, those of blocks included."""
    for key, value in block.items():
        where = f"{path}.{key}" if path else key
        yield where
        if isinstance(value, dict):
            yield from _leaves(value, where)


def _rules(keys: Mapping[str, Rule], path: str = "") -> Iterator[tuple[str, Rule]]:
    for key, rule in keys.items():
        where = f"{path}.{key}" if path else key
        yield where, rule
        yield from _rules(rule.keys, where)


@functools.cache
def _deepspeed_rules() -> tuple[tuple[str, Rule], ...]:
    return tuple(_rules(TOP_LEVEL_KEYS))


def _set(document: Document, path: str, value: Any) -> str:
    *parents, last = path.split(".")
    block: Any = document
    for key in parents:
        if not isinstance(block.get(key), dict):
            block[key] = {}
        block = block[key]
    block[last] = copy.deepcopy(value)
    return f"{path} = {_short(value)}"


def _odd_value(chance: random.Random, document: Document, overrides: list[str]) -> str:
    return _set(document, chance.choice(list(_leaves(document))), chance.choice(ODD_VALUES))


def _odd_value_of_dsaux(chance: random.Random, document: Document, overrides: list[str]) -> str:
    return _set(document, chance.choice(list(readme_table())), chance.choice(ODD_VALUES))


def _odd_number(chance: random.Random, document: Document, overrides: list[str]) -> str:
    numbers = [value for value in ODD_VALUES if isinstance(value, (int, float)) and not isinstance(value, bool)]
    paths = [path for path in readme_table() if "number" in readme_table()[path]]
    return _set(document, chance.choice(paths), chance.choice(numbers))


def _odd_override(chance: random.Random, document: Document, overrides: list[str]) -> str:
    path = chance.choice([*_leaves(document), *readme_table()])
    value = chance.choice(ODD_VALUES)
    text = value if isinstance(value, str) else json.dumps(value)
    if "\0" in text or not text.isprintable():
        text = "text"  # no process can be given the others
    overrides.append(f"{path}={text}")
    return f"--set {path}={_short(text)}"


def _deepspeed_key(chance: random.Random, document: Document, overrides: list[str]) -> str:
    path, rule = chance.choice(_deepspeed_rules())
    return _set(document, path, _fitting(chance, rule))


_OF_MANY_OPTIMIZERS = ("foreach", "maximize", "capturable", "differentiable", "fused")


def _optimizer_parameter(chance: random.Random, document: Document, overrides: list[str]) -> str:
    name = chance.choice((*TORCH_OPTIMIZERS, *DEEPSPEED_OPTIMIZERS))
    known = sorted({*TORCH_OPTIMIZERS.get(name, ()), *DEEPSPEED_OPTIMIZERS.get(name, ()), *_OF_MANY_OPTIMIZERS})
    params = {key: _fitting(chance, OPTIMIZER_PARAM_RULES[key]) for key in chance.sample(known, min(3, len(known)))}
    return _set(document, chance.choice(("optimizer", "dsaux.aux.optimizer")), {"type": name, "params": params})


def _scheduler_parameter(chance: random.Random, document: Document, overrides: list[str]) -> str:
    name = chance.choice(list(SCHEDULERS))
    keys = chance.sample(list(SCHEDULERS[name]), min(chance.randint(1, 5), len(SCHEDULERS[name])))
    params = {key: _fitting(chance, SCHEDULERS[name][key]) for key in keys}
    return _set(document, "scheduler", {"type": name, "params": params})


def _fitting(chance: random.Random, rule: Rule) -> Any:
    """Mostly a value that the rule allows, at its edges or far out; now and then any."""
    if chance.random() < 0.15:
        return chance.choice(ODD_VALUES)
    if rule.kind == "block":
        keys = chance.sample(list(rule.keys), min(2, len(rule.keys)))
        return {key: _fitting(chance, rule.keys[key]) for key in keys}
    if rule.kind == "pair":
        return [_fitting(chance, replace(rule, kind="number")) for _ in range(2)]
    allowed = [value for value in (*rule.choices, *rule.also, *ODD_VALUES, 0.1, 0.9, 5, 8) if rule.allows(value)]
    return chance.choice(allowed)


def _remove(chance: random.Random, document: Document, overrides: list[str]) -> str:
    path = chance.choice(list(_leaves(document)))
    parents, _, last = path.rpartition(".")
    del _block(document, parents)[last]
    return f"{path} removed"


def _swap(chance: random.Random, document: Document, overrides: list[str]) -> str:
    """Exchanges the values of two keys, of which neither lies inside the other."""
    while True:
        first, second = chance.sample(list(_leaves(document)), 2)
        if not f"{first}.".startswith(f"{second}.") and not f"{second}.".startswith(f"{first}."):
            break
    (one, _, key), (other, _, name) = first.rpartition("."), second.rpartition(".")
    left, right = _block(document, one), _block(document, other)
    left[key], right[name] = right[name], left[key]
    return f"{first} and {second} exchanged"


def _block(document: Document, path: str) -> Any:
    block: Any = document
    for key in path.split(".") if path else ():
        block = block[key]
    return block


WILD: tuple[Change, ...] = (
    _odd_value,
    _odd_value_of_dsaux,
    _odd_number,
    _odd_override,
    _deepspeed_key,
    _deepspeed_key,
    _deepspeed_key,
    _optimizer_parameter,
    _optimizer_parameter,
    _scheduler_parameter,
    _scheduler_parameter,
    _remove,
    _swap,
)


# ---- changes that are wrong, whatever the rest holds ----------------------------------------------------------------


def _misspelt(chance: random.Random, document: Document, overrides: list[str]) -> str:
    path = chance.choice(list(_leaves(document)))
    parents, _, name = path.rpartition(".")
    place = chance.randrange(len(name))
    wrong = chance.choice((name[:place] + name[place + 1 :], name[:place] + "x" + name[place:], name.title() + " ", ""))
    block = _block(document, parents)
    block[wrong] = block.pop(name)
    return f"{path} is called {wrong!r}"


def _unknown_key(chance: random.Random, document: Document, overrides: list[str]) -> str:
    blocks = ["", *(path for path in _leaves(document) if isinstance(_block(document, path), dict))]
    names = ("x", "", "Ω", "\ud800", "\n[rank 0 on x] error: no", "k" * 20_000, "a.b", "__class__", "\x1b[2J", "x ")
    path, name = chance.choice(blocks), chance.choice(names)
    _block(document, path)[name] = chance.choice(ODD_VALUES)
    return f"{path or 'the top level'} has a key {_short(name)}"


def _not_allowed(chance: random.Random, document: Document, overrides: list[str]) -> str:
    """A value that the README's table does not allow."""
    while True:
        path = chance.choice(list(readme_table()))
        value = chance.choice(ODD_VALUES)
        if not readme_allows(readme_table()[path], value):
            break
    return _set(document, path, value)


def _against_the_table(chance: random.Random, document: Document, overrides: list[str]) -> str:
    """A value of DeepSpeed's that the README's other table rules out."""
    wrong: tuple[Sets, ...] = (
        {"zero_optimization": {"stage": chance.choice((-1, 2, 3, 4, "1", 1.0, None))}},
        {"fp16": {"enabled": True}},
        {"gradient_clipping": chance.choice((-1, -1e308, "1", True, None))},
        {"optimizer": chance.choice(({}, {"type": "LBFGS"}, {"type": "Adamm", "params": {"lr": 0.1}}, [], None))},
        {"scheduler": chance.choice(({"type": "CosineAnnealingLR", "params": {}}, {"type": None}, [], "WarmupLR"))},
        {"dsaux.pipeline.schedule": "1f1b", "dsaux.run.exact_epochs": 1, "dsaux.run.epochs": 2},
        {"dsaux.pipeline.stages": chance.choice((2, 5, 6, 10**6))},
        {"dsaux.pipeline.partition": chance.choice(([1], ["group2.block1"], [0], [99], "tiem", [None], [[]]))},
        batch(chance.choice((1, 49, 17, 2**63)), 2, 2),
        batch(16, 1, 16),
    )
    return apply(document, chance.choice(wrong))


WRONG: tuple[Change, ...] = (_misspelt, _unknown_key, _not_allowed, _not_allowed, _against_the_table)


def apply(document: Document, sets: Sets) -> str:
    """Sets keys such as "dsaux.run.epochs" in place; says what was set."""
    return ", ".join(_set(document, path, value) for path, value in sets.items())


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 100 else f"{text[:90]} ... ({len(text)} characters)"
