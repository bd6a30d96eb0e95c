"""A watch over all ranks: when one dies, hangs or raises, the run ends on every rank and says why.

train.py opens a `Watch` around the run, from before the process group to the end. A thread of it publishes every second
how far this rank is, and reads how far the others are:

    rank 0   main thread   step 7 ... | blocked in a collective .....................
             watch         sign    sign    sign    "stopped because rank 1 ...", exit 1
                            |       |       ^
             store         the process group's own, keys below "dsaux/watch/"
                            |       |       |
    rank 1   watch         sign    sign    cause
             main thread   step 7 ......... raises

The thread has a connection of its own and takes part in no collective: it works on while its main thread is blocked.
The cause that is published first is the one that every rank reports.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from types import TracebackType

from dsaux.config_rules import ConfigError
from dsaux.runtime import EXIT_BAD_INPUT, Place, Stopped
from dsaux.watch_board import STORE_TIMEOUT_S, Board, locate, machine, main_thread_frames, process_exists
from dsaux.watch_rules import (
    SHORT_SILENCE_S,
    Cause,
    RunFailedError,
    Seen,
    Sign,
    behind,
    describe,
    find_gone,
    find_stalled,
    is_consequence,
    is_timeout,
)

SILENCE_S = 30.0
"""Without a sign of life for so long a rank on another host is gone; longer than any call that keeps Python's lock."""
EXPLAIN_S = 8.0
"""How long a rank with a broken connection looks for the rank that broke it."""
LINGER_S = 10.0
"""How long the rank that failed, or that holds the store, waits until the others have read the cause. They read every
second, but a machine that is overloaded, or a virtual one that is halted, may hold one of them up for seconds."""
REPLY_S = 0.5
"""How long the store stays when all have left: without their answer PyTorch prints C++ traces behind the last line."""
RECORD_S = 3.0
"""How long the last record of a run may take: a full or absent disk must not keep a rank from ending."""
STORE_ATTEMPTS = 5
STALL_SHARE = 0.9
"""Share of the timeout after which a run hangs: before NCCL's own watchdog, which ends a process without a word."""


class Watch:
    """Context of a run that ends all ranks when one dies, hangs or raises; with one process it does nothing.

    While the main thread is blocked, the watch's thread prints the cause in one line and ends the process. An error
    that leaves the context is told to the others; one that only says that another rank did not answer is explained
    before. Both go on as `RunFailedError`; `ConfigError` and what is no `Exception` stay what they are.

    Args:
        place: this rank's place.
        timeout_s: timeout of the process group.
        on_stop: called with the cause before the watch's thread ends the process, in a thread: the run's last record.
        period_s: seconds between two signs.
        silence_s: how long a rank on another host may be silent.
    """

    def __init__(
        self,
        place: Place,
        *,
        timeout_s: float,
        on_stop: Callable[[str], None] | None = None,
        period_s: float = 1.0,
        silence_s: float = SILENCE_S,
    ) -> None:
        self._place, self._timeout_s, self._on_stop = place, timeout_s, on_stop
        self._period_s, self._silence_s = period_s, min(silence_s, timeout_s)
        self._own = Sign(place.rank, place.host, machine(), os.getpid())
        self._stage: int | None = None
        self._activity, self._step, self._moves, self._where = "start", 0, 0, 0
        self._seen: dict[int, Seen] = {}
        self._board: Board | None = None
        self._is_done = self._was_connected = False
        self._attempts = 0
        self._error: BaseException | None = None
        self._error_at = 0.0
        self._cause: Cause | None = None
        self._lock, self._wake, self._ended = threading.Lock(), threading.Event(), threading.Event()
        self._thread: threading.Thread | None = None

    def progress(self, *, step: int | None = None, activity: str | None = None, stage: int | None = None) -> None:
        """Say what the main thread is about to do; costs a few assignments.

        Args:
            step: number of the optimizer step, from 1.
            activity: for the message, e.g. "evaluation"; not given, as the others, it stays what it was.
            stage: stage of this rank.
        """
        self._moves += 1
        self._step = self._step if step is None else step
        self._activity = self._activity if activity is None else activity
        self._stage = self._stage if stage is None else stage

    def fail(self, error: BaseException) -> RunFailedError:
        """Tell the others of an error, or find the rank that it comes from; takes seconds.

        Returns:
            The error to leave with: its text is the run's last line.
        """
        with self._lock:  # from here on the thread leaves the end of the process to this one
            self._error, self._error_at = error, time.monotonic()
        self._wake.set()
        if self._thread:
            self._ended.wait(EXPLAIN_S + LINGER_S + 4 * STORE_TIMEOUT_S)
        if self._cause and self._cause.ranks != (self._place.rank,):
            return RunFailedError(f"stopped because {self._cause.text}")
        stopped = RunFailedError(f"{self._own} failed: {describe(error)}")
        stopped.__cause__ = error
        return stopped

    def close(self) -> None:
        """Say that this rank has ended as it should. Rank 0, which may hold the store, waits for the others' word."""
        with self._lock:
            self._is_done = True
        self._wake.set()
        if self._thread:
            self._ended.wait(self._timeout_s)

    def __enter__(self) -> Watch:
        if self._place.world_size > 1:
            import torch.distributed  # noqa: F401  now, and not in two threads at a time

            self._thread = threading.Thread(target=self._run, name="dsaux-watch", daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None or isinstance(error, Stopped) or (isinstance(error, SystemExit) and not error.code):
            self.close()  # all ranks stop together, where one was asked to
        elif self._thread:
            stopped = self.fail(error)
            if isinstance(error, Exception) and not isinstance(error, ConfigError):
                raise stopped from stopped.__cause__

    # ---- in the watch's thread --------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while not self._look():
                self._wake.wait(self._period_s)
                self._wake.clear()
        except Exception as error:  # the run goes on without its watch, but not in silence
            self._say(f"warning: nothing watches this rank any more: {describe(error)}")
        finally:
            self._ended.set()

    def _look(self) -> bool:
        """Look around once; True when there is nothing left to watch."""
        cause = self._exchange()
        now = time.monotonic()
        if self._error is not None:
            return self._settle(self._error, cause, now=now)
        if self._own.is_done and self._may_leave():
            self._sign_off()
            return True
        cause = cause or self._judge(now, silence_s=self._silence_s)
        if cause is not None:
            cause = self._publish(cause)
            with self._lock:
                if self._error is None:
                    self._leave(cause)
        return False  # the main thread has raised just now: the next look tells it

    def _exchange(self) -> Cause | None:
        """Publish this rank's sign, read the others'; returns the cause of the end, if there is one."""
        where, place, waits = locate(main_thread_frames())
        self._moves += where != self._where
        self._where = where
        self._own = own = replace(
            self._own,
            stage=self._stage,
            step=self._step,
            activity=self._activity,
            place=place,
            waits=waits or self._error is not None,
            moves=self._moves,
            beat=self._own.beat + 1,
            is_done=self._is_done,
        )
        signs, cause = [own], None
        try:
            if 0 in self._seen and self._is_alive(self._seen[0].sign) is False:
                raise ConnectionError("rank 0 is gone")  # asking its store would only print C++ traces
            self._board = self._board or Board()
            signs, cause = self._board.exchange(own, known=self._seen, world_size=self._place.world_size)
            self._was_connected, self._attempts = True, 0
        except (RuntimeError, OSError):
            self._board = None
            self._attempts += 1
        now = time.monotonic()
        for sign in signs:
            self._seen.setdefault(sign.rank, Seen(sign, now, now)).update(sign, now=now)
        return cause

    def _judge(self, now: float, *, silence_s: float) -> Cause | None:
        if not self._was_connected:  # the start of the process group has a timeout of its own
            return None
        others = [seen for rank, seen in self._seen.items() if rank != self._place.rank]
        reach_s = silence_s if self._board else float("inf")  # without the store all are silent
        gone = find_gone(others, now=now, silence_s=reach_s, is_alive=self._is_alive)
        if gone is not None or self._board is None:
            return gone or (self._lost_store() if self._attempts >= STORE_ATTEMPTS else None)
        missing = [rank for rank in range(self._place.world_size) if rank not in self._seen]
        stall_s = max(STALL_SHARE * self._timeout_s, 3 * self._period_s)  # signs are up to two periods old
        return find_stalled(list(self._seen.values()), now=now, stall_s=stall_s, missing=missing)

    def _lost_store(self) -> Cause:
        holder = str(self._seen[0].sign) if 0 in self._seen else "rank 0"
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            holder = f"torchrun's first agent, on {os.environ.get('MASTER_ADDR')},"
        return Cause(f"{holder} cannot be reached: the process that holds the store is gone, or its host", (0,))

    def _settle(self, error: BaseException, cause: Cause | None, *, now: float) -> bool:
        """Find what the main thread is to say of its error; True when that is known, and told to the others."""
        has_time = now - self._error_at < EXPLAIN_S
        own = Cause(f"{self._own} failed: {describe(error)}", (self._place.rank,))
        if isinstance(error, ConfigError):
            own = replace(own, exit_code=EXIT_BAD_INPUT)
        if not self._was_connected:  # the store may still come, but not where this rank is to hold it
            return self._place.rank == 0 or not has_time
        if is_consequence(error):
            cause = cause or self._judge(now, silence_s=SHORT_SILENCE_S)
            if cause is None and has_time:
                return False
            blamed = behind([seen.sign for seen in self._seen.values() if not seen.sign.is_done])
            if cause is None and is_timeout(error) and len(blamed) == 1 and blamed[0].rank != own.ranks[0]:
                cause = Cause(f"{blamed[0]} hangs at {blamed[0].place}: {describe(error)}", (blamed[0].rank,))
            self._cause = own = self._publish(cause or own)
        else:
            self._publish(own)
        self._tell(own)
        return True

    def _may_leave(self) -> bool:
        """Whether the others know that this rank has ended, and do not need its store any more."""
        if self._board is None:
            # Rank 0 has waited for this rank's last word, however late this one reads that of the others.
            is_alone = 0 in self._seen and self._is_alive(self._seen[0].sign) is False
            return is_alone or not self._was_connected or self._attempts >= STORE_ATTEMPTS
        return self._place.rank != 0 or all(seen.sign.is_done for seen in self._seen.values())

    def _sign_off(self) -> None:
        """Rank 0 stays, with the store, until the others have asked it for the last time."""
        if self._board is None:
            return
        until = time.monotonic() + LINGER_S
        with contextlib.suppress(RuntimeError, OSError):
            if self._place.rank != 0:
                self._board.count("closed", 1)
                return
            while self._board.count("closed", 0) < self._place.world_size - 1 and time.monotonic() < until:
                time.sleep(0.05)
            time.sleep(0.1)  # the last one's count is in the store before the answer to it is out

    def _leave(self, cause: Cause) -> None:
        if self._on_stop is not None:
            record = threading.Thread(target=self._on_stop, args=(cause.text,), daemon=True)
            record.start()
            record.join(RECORD_S)
        if self._place.rank in cause.ranks:
            frames = traceback.format_stack(main_thread_frames()[0])
            os.write(2, f"The main thread of rank {self._place.rank}:\n{''.join(frames)}".encode())
        self._say(f"error: {'' if self._place.rank in cause.ranks else 'stopped because '}{cause.text}")
        self._tell(cause)
        os._exit(cause.exit_code)

    def _publish(self, cause: Cause) -> Cause:
        with contextlib.suppress(RuntimeError, OSError):
            return self._board.publish(cause) if self._board else cause
        return cause

    def _tell(self, cause: Cause) -> None:
        """Count this rank as told. The rank to blame stays until all are; rank 0, with the store, until all left."""
        if self._board is None:
            return
        now, rank = time.monotonic(), self._place.rank
        deaf = [seen for seen in self._seen.values() if not self._listens(seen, cause, now=now)]
        listeners = self._place.world_size - len(deaf)
        # Who has not come yet finds the cause in the store, if that is still there.
        limit_s = LINGER_S if len(self._seen) == self._place.world_size else SILENCE_S
        key, target = ("left", listeners - 1) if rank == 0 else ("told", listeners if rank in cause.ranks else 0)
        with contextlib.suppress(RuntimeError, OSError):
            self._board.count("told", 1)
            while self._board.count(key, 0) < target and time.monotonic() - now < limit_s:
                time.sleep(0.1)
            self._board.count("left", 1)
            if rank == 0:
                time.sleep(REPLY_S)  # the last one's count is in the store before the answer to it is out

    def _listens(self, seen: Seen, cause: Cause, *, now: float) -> bool:
        """Whether a rank will read the cause: of this machine one that lives, late perhaps; else one heard lately.

        One to blame that is silent is stopped, by a signal or a debugger.
        """
        is_alive = self._is_alive(seen.sign)
        if seen.sign.is_done or is_alive is False:
            return False
        is_heard = now - seen.heard_at <= SHORT_SILENCE_S
        return is_heard or (is_alive is True and seen.sign.rank not in cause.ranks)

    def _is_alive(self, sign: Sign) -> bool | None:
        is_here = self._own.machine and sign.machine == self._own.machine
        return process_exists(sign.pid) if is_here else None

    def _say(self, message: str) -> None:
        # Not through sys.stderr: the display may have put something of its own there, with locks.
        os.write(2, f"[rank {self._place.rank} on {self._place.host}] {message}\n".encode())
