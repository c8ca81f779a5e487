"""Runs in processes of their own that are killed, interrupted or starved at chosen points.

A run is a fork of the test's process, so that it starts in milliseconds. Its points are its calls to the system that
read, write, flush, move or remove: counted in an undisturbed run, and drawn from in a disturbed one.
"""

import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

CALLS = (
    "pwrite",
    "preadv",
    "posix_fallocate",
    "fsync",
    "open",
    "rename",
    "replace",
    "unlink",
    "mkdir",
    "rmdir",
)

KILLED = -signal.SIGKILL


def forked(work: Callable[[], int], log: Path, *, after: float | None = None, number: int = signal.SIGKILL) -> int:
    """Runs work in a fork; gives its exit code, or the negative number of the signal that ended it.

    Args:
        work: Gives the exit code.
        log: Takes what it prints.
        after: Seconds after which the fork gets a signal.
        number: Of that signal.
    """
    pid = os.fork()
    if pid == 0:
        code = 99
        try:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(descriptor, 1)
            os.dup2(descriptor, 2)
            sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115 - not those of pytest
            sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
            code = work()
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(code)
    if after is not None:
        time.sleep(after)
        os.kill(pid, number)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


class Points:
    """The points of a run, counted, with something that happens at one of them.

    Args:
        at: Number of the point, from 1.
        happens: Called there, before the call or after it.
        before: Whether it is before.
        calls: Which calls are points.
    """

    def __init__(
        self,
        at: int | None = None,
        happens: Callable[[], None] = lambda: None,
        before: bool = True,
        calls: Sequence[str] = CALLS,
    ) -> None:
        self.count = 0
        self._calls = calls
        self._at = at
        self._happens = happens
        self._before = before

    def install(self) -> None:
        """Wraps the calls of this process, for good: it is a fork."""
        for name in self._calls:
            setattr(os, name, self._wrapped(getattr(os, name)))

    def _wrapped(self, call: Callable) -> Callable:
        def counted(*arguments, **options):
            self.count += 1
            is_here = self.count == self._at
            if is_here and self._before:
                self._happens()
            result = call(*arguments, **options)
            if is_here and not self._before:
                self._happens()
            return result

        return counted


def kill() -> None:
    """Ends this process as a power cut would."""
    os.kill(os.getpid(), signal.SIGKILL)


def counted(work: Callable[[], int], log: Path, calls: Sequence[str] = CALLS) -> tuple[int, int]:
    """Runs work in a fork; gives its exit code and its number of points."""
    tally = log.with_suffix(".points")

    def run() -> int:
        points = Points(calls=calls)
        points.install()
        code = work()
        tally.write_text(str(points.count))
        return code

    return forked(run, log), int(tally.read_text()) if tally.exists() else 0


def disturbed(work: Callable[[], int], log: Path, points: Points) -> int:
    """Runs work in a fork in which something happens."""

    def run() -> int:
        points.install()
        return work()

    return forked(run, log)


def killed(work: Callable[[], int], log: Path, at: int, before: bool) -> int:
    """Runs work in a fork that is killed at a point."""
    return disturbed(work, log, Points(at, kill, before))


def contents(folder: Path) -> dict[str, bytes]:
    """Path below a folder → content, of every file."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def assert_same(found: Path, expected: Path) -> None:
    """Two folders hold the same, byte for byte."""
    one, other = contents(found), contents(expected)
    assert one.keys() == other.keys()
    assert [name for name in one if one[name] != other[name]] == []


def draws(seed: int, points: int, count: int) -> Iterator[tuple[int, bool]]:
    """Points of a run, the end as likely as the beginning, each before or after its call."""
    generator = random.Random(seed)
    for _ in range(count):
        yield generator.randint(1, points), generator.random() < 0.5


@contextmanager
def working_in(folder: Path) -> Iterator[None]:
    """Another working directory, where relative outputs go."""
    before = Path.cwd()
    folder.mkdir(parents=True, exist_ok=True)
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)
