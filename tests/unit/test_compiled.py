"""A call that cannot be compiled runs as it is: once tried, once said, and nothing of the attempt is left."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from deepspeed.utils import logger

from dsaux.compiled import CompiledCall, chain_of


class Recorded(logging.Handler):
    """Keeps what is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


@pytest.fixture
def lines() -> Any:
    handler = Recorded()
    logger.addHandler(handler)
    yield handler.lines
    logger.removeHandler(handler)


def test_where_compiling_fails_the_call_runs_as_it_is_and_the_log_says_so_once(
    monkeypatch: pytest.MonkeyPatch, lines: list[str]
) -> None:
    seen = torch.zeros(1)

    def run(x: torch.Tensor) -> torch.Tensor:
        seen.add_(1)
        return x + torch.rand(1)

    def compile_to_failure(function: Callable[..., Any], **kwargs: Any) -> Callable[..., Any]:
        def fails(x: torch.Tensor) -> torch.Tensor:
            function(x)  # part of it has run
            raise RuntimeError("no C++ compiler\nand more")

        return fails

    monkeypatch.setattr(torch, "compile", compile_to_failure)
    call = CompiledCall(run, name="stage 3", buffers=[seen])
    torch.manual_seed(0)
    found = [float(call(torch.zeros(1))) for _ in range(2)]
    assert call.is_compiled is False
    assert float(seen) == 2, "what the attempt had written is still there"
    torch.manual_seed(0)
    assert found == [float(torch.rand(1)) for _ in range(2)]
    (line,) = lines
    assert line == "dsaux.run.compile: stage 3 runs without torch.compile, which failed: RuntimeError: no C++ compiler"


@pytest.mark.compile
@pytest.mark.filterwarnings("ignore:dynamo_pgo")  # one of the caches that are switched off
def test_without_a_compiler_the_call_runs_as_it_is(lines: list[str]) -> None:
    import torch._inductor.config as inductor

    call = CompiledCall(lambda x: x.sin() + 1.0, name="the AuxNet", buffers=[])
    with inductor.patch({"cpp.cxx": ("no-such-compiler",), "force_disable_caches": True}):
        torch.testing.assert_close(call(torch.ones(3)), torch.ones(3).sin() + 1.0)
    assert call.is_compiled is False
    (line,) = lines
    assert line.startswith("dsaux.run.compile: the AuxNet runs without torch.compile, which failed: ")


def test_a_fault_of_the_network_itself_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, **kwargs: function)

    def run(x: torch.Tensor) -> torch.Tensor:
        raise ValueError("a layer of the user's")

    with pytest.raises(ValueError, match="a layer of the user's"):
        CompiledCall(run, name="stage 0", buffers=[])(torch.zeros(1))


def test_a_chain_runs_its_layers_in_order() -> None:
    assert chain_of([lambda x: x + 1, lambda x: 10 * x])(2) == 30
