"""How the small commands (`python -m dsaux.export`, `dsaux.predict`) read their arguments, speak and end."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import NoReturn

from rich.console import Console
from rich.live import Live
from rich.text import Text

from dsaux.config_rules import ConfigError
from dsaux.runtime import EXIT_BAD_INPUT, EXIT_FAILED, EXIT_INTERRUPTED


class Parser(argparse.ArgumentParser):
    """An `ArgumentParser` whose errors are one line, as those of any other wrong input."""

    def error(self, message: str) -> NoReturn:
        """Refuse the command line.

        Raises:
            ConfigError: always.
        """
        raise ConfigError(f"{message}. Run {self.prog} --help.")


def run(main: Callable[[Sequence[str] | None], int], argv: Sequence[str] | None = None) -> int:
    """Call a command; one clear line and 2 for bad input, or 1 for what failed on the way.

    Returns:
        The exit code.
    """
    try:
        return main(argv)
    except ConfigError as error:
        return _say(error, EXIT_BAD_INPUT)
    except (RuntimeError, OSError) as error:
        return _say(error, EXIT_FAILED)
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED


def console() -> Console:
    """Standard output; colours on a terminal only."""
    # Said outright: rich would also take FORCE_COLOR in a batch job for a terminal.
    return Console(force_terminal=sys.stdout.isatty(), highlight=False)


@contextlib.contextmanager
def progress() -> Iterator[Callable[[str], None]]:
    """Gives a function that says on standard error what is being done: once, or in one line of a terminal.

    No thread draws that line: it would take time from what is measured.
    """
    if sys.stderr.isatty():
        out = Console(stderr=True, force_terminal=True, highlight=False)
        with Live(
            console=out, auto_refresh=False, transient=True, redirect_stdout=False, redirect_stderr=False
        ) as live:
            yield lambda text: live.update(Text(text, style="dim", no_wrap=True), refresh=True)
        return
    known: set[str] = set()

    def say(text: str) -> None:
        if text not in known:
            known.add(text)
            print(text, file=sys.stderr, flush=True)

    yield say


def show_summary(out: Console, title: str, rows: Sequence[tuple[str, Text | str]]) -> None:
    """A title, and names and values below each other.

    Args:
        out: where to write.
        title: first line.
        rows: names and values.
    """
    width = max(len(name) for name, _ in rows)
    out.print(Text(title, style="bold"), soft_wrap=True)
    for name, value in rows:
        line = Text.assemble((f"  {name:<{width}}", "dim"), "  ", value)
        out.print(line, soft_wrap=True)


def _say(error: Exception, code: int) -> int:
    print(f"error: {error}", file=sys.stderr, flush=True)
    return code
