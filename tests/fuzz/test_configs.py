"""No configuration, however odd, ends a run but by training or by one clear error: the short form of the fuzzing.

The long one is `python -m tests.fuzz --configs 1000`.
"""

from __future__ import annotations

import itertools
from collections import Counter
from pathlib import Path

import pytest

from tests.fuzz.configs import EITHER, REFUSED, TRAINED, Mutant, make_mutant
from tests.fuzz.readme import readme_allows, readme_table
from tests.fuzz.runs import Outcome, run
from tests.fuzz.verdict import judge

SEED, COUNT = 0, 40
MUTANTS = (make_mutant(SEED, number) for number in itertools.count())
# A machine that never did would first compile DeepSpeed's fused Adam, for a minute; a network is compiled anew.
SHORT = tuple(itertools.islice((mutant for mutant in MUTANTS if not mutant.builds_an_operation), COUNT))


@pytest.mark.launch
@pytest.mark.parametrize("mutant", SHORT, ids=lambda mutant: str(mutant.number))
def test_a_mutated_configuration_trains_or_ends_with_one_clear_error(mutant: Mutant, tmp_path: Path) -> None:
    outcome = run(mutant, tmp_path / "mutant")
    verdict = judge(mutant, outcome)
    assert not verdict.is_defect, "\n".join((verdict.reason, *mutant.changes, outcome.stderr[-3000:]))


def test_a_mutant_depends_on_seed_and_number_alone() -> None:
    assert make_mutant(3, 50) == make_mutant(3, 50)
    assert make_mutant(3, 50) != make_mutant(4, 50)


def test_many_mutants_must_train_and_many_must_not() -> None:
    counts = Counter(make_mutant(SEED, number).expects for number in range(200))
    assert counts[TRAINED] >= 50
    assert counts[REFUSED] >= 30


@pytest.mark.parametrize("words", sorted(set(readme_table().values())))
def test_every_type_of_the_readme_is_understood(words: str) -> None:
    assert not readme_allows(words, object())


def _mutant(expects: str, *, epochs: int = 1) -> Mutant:
    return Mutant(0, ("none",), b'{"dsaux": {"run": {"epochs": %d}}}' % epochs, expects=expects)


def _outcome(code: int | None, *, stdout: str = "", stderr: str = "", events: str = "step eval final") -> Outcome:
    return Outcome(code, stdout, stderr, [{"event": event, "loss": 1.0} for event in events.split()], seconds=1.0)


CLEAR = "[rank 0 on host] error: dsaux.run.epochs is 0; it must be a whole number >= 1. Change it."
NAN_TEST = "[rank 0 on host] error: the test loss is inf behind step 2: the network has diverged. Lower lr."
NAN = "[rank 0 on host] error: the loss is nan in step 1. Lower optimizer.params.lr."


@pytest.mark.parametrize(
    ("expects", "outcome", "kind"),
    [
        (TRAINED, _outcome(0), "trained"),
        (REFUSED, _outcome(2, stderr=CLEAR), "refused"),
        (EITHER, _outcome(1, stderr=NAN), "failed clearly"),
        (EITHER, _outcome(1, stderr=NAN_TEST), "failed clearly"),
        (EITHER, _outcome(1, stderr=f"Traceback\n{NAN}"), "DEFECT"),
        (TRAINED, _outcome(2, stderr=CLEAR), "DEFECT"),
        (TRAINED, _outcome(1, stderr=NAN), "DEFECT"),
        (REFUSED, _outcome(0), "DEFECT"),
        (EITHER, _outcome(0, stderr="UserWarning: no"), "DEFECT"),
        (EITHER, _outcome(0, stderr="Traceback"), "DEFECT"),
        (EITHER, _outcome(0, events="step"), "DEFECT"),
        (EITHER, _outcome(2, stderr=f"{CLEAR}\n{CLEAR}"), "DEFECT"),
        (EITHER, _outcome(2, stderr=CLEAR.replace("Change it.", "")), "DEFECT"),
        (EITHER, _outcome(2, stderr=CLEAR.replace("dsaux.run.epochs", "it")), "DEFECT"),
        (EITHER, _outcome(2, stderr=f"{CLEAR}\x1b[2J"), "DEFECT"),
        (EITHER, _outcome(1, stderr="[rank 0 on host] error: KeyError: 'x'"), "DEFECT"),
        (EITHER, _outcome(-11), "DEFECT"),
        (EITHER, _outcome(None), "DEFECT"),
    ],
)
def test_verdict(expects: str, outcome: Outcome, kind: str) -> None:
    assert judge(_mutant(expects), outcome).kind == kind


def test_a_run_with_a_value_that_the_readme_does_not_allow_is_a_defect() -> None:
    assert judge(_mutant(EITHER, epochs=0), _outcome(0)).is_defect


@pytest.mark.parametrize(("schedule", "is_defect"), [("local", False), ("al", True)])
def test_a_warning_of_a_setting_without_effect_must_be_true(schedule: str, is_defect: bool) -> None:
    document = b'{"dsaux": {"aux": {"rho": 0.1}, "pipeline": {"schedule": "%s"}}}' % schedule.encode()
    mutant = Mutant(0, ("none",), document, expects=TRAINED)
    words = "warning: dsaux.aux.rho is 0.1, which has no effect with schedule local: it has no AuxNet."
    assert judge(mutant, _outcome(0, stderr=words)).is_defect == is_defect
    assert judge(mutant, _outcome(0, stderr=words.replace("rho", "width"))).is_defect, "it is not there"


@pytest.mark.parametrize("value", [True, False])
def test_a_warning_of_a_switch_that_cannot_be_followed_must_be_true(value: bool) -> None:
    document = b'{"dsaux": {"run": {"cuda_graphs": %s}}}' % str(value).lower().encode()
    words = "warning: dsaux.run.cuda_graphs is true, but the device is cpu, and only GPUs have them: ticks run eagerly."
    assert judge(Mutant(0, ("none",), document, expects=TRAINED), _outcome(0, stderr=words)).is_defect != value
