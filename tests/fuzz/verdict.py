"""Judges how a run with a mutated configuration ended: a defect is what the project promises never to do.

Used by the short form (test_configs.py) and the long one (`python -m tests.fuzz`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from dsaux.ds_keys import TOP_LEVEL_KEYS
from tests.fuzz.configs import EITHER, REFUSED, TRAINED, Mutant
from tests.fuzz.readme import readme_allows, readme_table
from tests.fuzz.runs import CONFIG, Outcome

LONGEST_ERROR = 1000
ERROR = re.compile(r"\[rank 0 on \S+\] error: (.*)")
MENDS = re.compile(
    r"\b(Add|Allowed|Change|Did you mean|Give|Install|Keep|Lower|Mend|Put|Remove|Set|Shorten|Sort|Start|Swap|Take|Use"
    r"|Write)\b"
)
CLEAR_FAILURE = re.compile(
    r"(rank 0 \(.*\) failed: )?(the loss(, at stage \d+,)? is .* in step \d+"
    r"|the test loss is .* behind step \d+: the network has diverged)\. Lower .*"
)
"""End of a run that its values earn and that no check can foresee."""
TRUE_WARNINGS = (
    "No CUDA runtime is found",
    "before it has started",  # of DeepSpeed's schedules, in a run with its timers, which shows DeepSpeed's log
    "You are using ZeRO with an untested optimizer",
    "Pipeline parallelism does not support overlapped communication",
    "cycle_momentum is disabled because",
    "BF16 gradient accumulation is not safe",
)
"""What may be said of a sensible configuration."""
WITHOUT_EFFECT = re.compile(r"warning: (dsaux\.[\w.]+) is .*, which has no effect with schedule (\w+): ")
"""What must be said of a setting that the schedule has no use for."""
OF_A_SWITCH = re.compile(r"(?:warning: |.*\] )(dsaux\.run\.(?:cuda_graphs|compile|channels_last))(?: is true, |: )")
"""What must be said of a switch that can't be followed here, on a CPU."""


@dataclass(frozen=True)
class Verdict:
    """What is thought of an outcome: "trained", "refused", "failed clearly" or "DEFECT", and why."""

    kind: str
    reason: str = ""

    @property
    def is_defect(self) -> bool:
        """Whether something has to be mended."""
        return self.kind == "DEFECT"


def judge(mutant: Mutant, outcome: Outcome) -> Verdict:
    """Holds an outcome against what the project promises of any configuration."""
    reasons = list(_defects(mutant, outcome))
    if reasons:
        return Verdict("DEFECT", "; ".join(reasons))
    error = (outcome.stderr.strip().splitlines() or [""])[-1]
    return Verdict({0: "trained", 2: "refused"}.get(outcome.code or 0, "failed clearly"), error)


def _defects(mutant: Mutant, outcome: Outcome) -> Iterator[str]:
    if outcome.code is None:
        yield "it hangs"
    elif outcome.code == 0:
        yield from _defects_of_a_trained_run(mutant, outcome)
    elif outcome.code == 2:
        yield from _defects_of_a_refusal(mutant, outcome)
    elif outcome.code == 1:
        last = (outcome.stderr.strip().splitlines() or [""])[-1]
        found = ERROR.fullmatch(last)
        if found is None or not CLEAR_FAILURE.fullmatch(found[1]):
            yield "it failed without a clear error"
        if "Traceback" in outcome.stderr + outcome.stdout:
            yield "it failed with a traceback"
        if mutant.expects != EITHER:
            yield f"it should have been {mutant.expects}"
    else:
        yield f"exit code {outcome.code}"


def _defects_of_a_trained_run(mutant: Mutant, outcome: Outcome) -> Iterator[str]:
    if mutant.expects == REFUSED:
        yield "it was accepted"
    effective = _with_overrides(mutant)
    for path, words in readme_table().items():
        found, value = _look_up(effective, path)
        if found and not readme_allows(words, value):
            yield f"the README does not allow the value of {path}"
    output = outcome.stdout + outcome.stderr
    if "Traceback" in output:
        yield "it trained with a traceback"
    kinds = [event["event"] for event in outcome.events]
    looked_at = ("eval",) if _look_up(effective, "dsaux.run.nan") == (True, "skip") else ("step", "eval")
    losses = [event["loss"] for event in outcome.events if event["event"] in looked_at]
    if kinds[-1:] != ["final"] or "eval" not in kinds:
        yield f"its metrics.jsonl has the events {kinds}"
    if None in losses:
        yield "a loss is not finite"
    for line in output.splitlines():
        if re.search(r"\[(INFO|DEBUG)\]", line):  # DeepSpeed's list of settings, under "log_level": "debug"
            continue
        if re.search("warn", line, re.IGNORECASE) and not _is_true_warning(line, effective):
            yield f"it warns: {line}"


def _is_true_warning(line: str, effective: Any) -> bool:
    """Whether a warning is right: a known one of a library, or of a setting that is there and has no effect."""
    switch = OF_A_SWITCH.match(line)
    if switch is not None:
        return _look_up(effective, switch[1]) == (True, True)
    found = WITHOUT_EFFECT.match(line)
    if found is not None:
        is_set, _ = _look_up(effective, found[1])
        return is_set and _look_up(effective, "dsaux.pipeline.schedule") == (True, found[2])
    return any(words in line for words in TRUE_WARNINGS)


def _defects_of_a_refusal(mutant: Mutant, outcome: Outcome) -> Iterator[str]:
    if mutant.expects == TRAINED:
        yield "it was refused"
    if "Traceback" in outcome.stderr + outcome.stdout:
        yield "it was refused with a traceback"
    lines = [line for line in outcome.stderr.splitlines() if not any(words in line for words in TRUE_WARNINGS)]
    found = ERROR.fullmatch(lines[0]) if len(lines) == 1 else None
    if found is None:
        yield f"it was refused with {len(lines)} lines"
        return
    error = found[1]
    if len(error) > LONGEST_ERROR:
        yield f"its error has {len(error)} characters"
    if not error.isprintable():
        yield "its error has characters that are not printable"
    if not MENDS.search(error):
        yield "its error has no mend"
    if CONFIG not in error and not any(_is_named(key, error) for key in _known_keys(mutant)):
        yield "its error names neither a key nor the file"


def _is_named(key: str, error: str) -> bool:
    shown = key if key.isprintable() else json.dumps(key)[1:-1]
    return re.search(rf"(?<!\w){re.escape(shown)}(?!\w)", error) is not None


def _known_keys(mutant: Mutant) -> set[str]:
    """Names of keys, those of the mutant among them; one of them has to stand in an error."""
    names = {key.rsplit(".", 1)[-1] for key in readme_table()} | set(TOP_LEVEL_KEYS) | {"dsaux", "override"}
    stack = [mutant.document]
    while stack:
        value = stack.pop()
        if isinstance(value, dict):
            names |= {key for key in value if key}
            stack += value.values()
    return names


def _with_overrides(mutant: Mutant) -> Any:
    document = mutant.document
    for override in mutant.overrides:
        path, _, text = override.partition("=")
        try:
            value = json.loads(text)
        except ValueError:
            value = text
        *parents, last = path.split(".")
        block = document
        for key in parents:
            block = block.setdefault(key, {})
        block[last] = value
    return document


def _look_up(document: Any, path: str) -> tuple[bool, Any]:
    for key in path.split("."):
        if not isinstance(document, dict) or key not in document:
            return False, None
        document = document[key]
    return True, document
