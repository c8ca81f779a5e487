"""Work shared by forked copies of this process, where the threads of one would wait for each other.

A copy begins with everything that this process has in memory and in open files, so that nothing is sent to it. It takes
the next piece from a counter that all share, and sends back what came of it. It dies with its parent: at the latest
when it has a result that nobody takes.

Results come back as pickles through pipes that have no name: only this process and its copies hold their ends, so that
nobody else can write into one. `concurrent.futures.ProcessPoolExecutor` would do the same, but when a piece fails it
waits for the pieces under way, for memory that the failed one holds too; these copies are ended at once.
"""

from __future__ import annotations

import multiprocessing
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.reduction import ForkingPickler
from typing import Any, TypeVar

from hf_llfc.errors import LLFCError, ProcessError

Item = TypeVar("Item")
Result = TypeVar("Result")

LEAVING = 5.0
"""Seconds for which a copy that is told to end may go on, before it is killed."""


def can_fork() -> bool:
    """Whether copies of this process may do work: on Linux, where system libraries stand a fork, and not in a copy."""
    return sys.platform == "linux" and not multiprocessing.current_process().daemon


def run_forked(
    function: Callable[[Item], Result],
    items: Sequence[Item],
    count: int,
    on_result: Callable[[Item, Result], None],
) -> None:
    """Does work on every item, in the order of the items, in forked copies of this process.

    Args:
        function: The work; it must not use an accelerator, nor take a lock that another thread of this process may
            hold now. Its results must be picklable.
        items: What to work on.
        count: How many copies.
        on_result: Told in this process what came of an item, one call at a time.

    Raises:
        ProcessError: A copy was killed.
        Exception: What the function raised; as a `RuntimeError` if it cannot be sent.
    """
    context = multiprocessing.get_context("fork")
    taken = context.Value("q", 0)
    copies: dict[Connection, Any] = {}
    try:
        for _ in range(min(count, len(items))):
            reader, writer = context.Pipe(duplex=False)
            copy = context.Process(
                target=_work, args=(function, items, taken, writer, [reader, *copies]), daemon=True, name="hf_llfc copy"
            )
            copies[reader] = copy
            _start(copy)
            writer.close()
        running = list(copies)
        while running:
            for reader in [each for each in wait(running) if isinstance(each, Connection)]:
                try:
                    place, result, error = reader.recv()
                except EOFError:
                    running.remove(reader)
                    _refuse_killed(copies[reader])
                    continue
                if error is not None:
                    raise error
                on_result(items[place], result)
    finally:
        _end(copies)


def _start(copy: Any) -> None:
    """Starts a copy that an interrupt from the keyboard does not reach."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        with warnings.catch_warnings():
            # Python warns of other threads, whose locks stay locked in the copy; it takes none of them.
            warnings.simplefilter("ignore", DeprecationWarning)
            copy.start()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _end(copies: dict[Connection, Any]) -> None:
    """Ends the copies that still run."""
    started = {reader: copy for reader, copy in copies.items() if copy.pid is not None}
    for copy in started.values():
        copy.terminate()
    for reader, copy in copies.items():
        reader.close()
        if reader in started:
            copy.join(LEAVING)
            if copy.exitcode is None:
                copy.kill()
                copy.join()


def _refuse_killed(copy: Any) -> None:
    copy.join()
    if copy.exitcode == 0:
        return
    how = f"signal {-copy.exitcode}" if copy.exitcode < 0 else f"exit code {copy.exitcode}"
    raise ProcessError(
        f"a worker process of this run ended before its work was done ({how}); see whether memory ran out, and run the"
        " same again"
    )


def _work(
    function: Callable[[Item], Result], items: Sequence[Item], taken: Any, writer: Connection, readers: list[Connection]
) -> None:
    """What a copy does."""
    import torch

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    for reader in readers:  # whoever holds one keeps a copy from seeing that its parent is gone
        reader.close()
    torch.set_num_threads(1)  # those of the parent are not there
    try:
        while True:
            with taken.get_lock():
                place = taken.value
                taken.value += 1
            if place >= len(items):
                return
            writer.send((place, *_outcome(function, items[place])))
    except BrokenPipeError:  # the parent is gone
        return


def _outcome(function: Callable[[Item], Result], item: Item) -> tuple[Result | None, Exception | None]:
    try:
        return function(item), None
    except Exception as error:
        if sys.version_info >= (3, 11) and not isinstance(error, LLFCError | OSError):
            error.add_note(traceback.format_exc())
        try:
            ForkingPickler.loads(ForkingPickler.dumps(error))
        except Exception:
            return None, RuntimeError(f"{type(error).__name__}: {error}")
        return None, error
