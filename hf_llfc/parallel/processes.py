"""The processes of a run: who does what, who waits for whom, and how all of them end when one fails.

Processes wait for each other in one way only: they *meet*. Each counts itself in at a small store that the main process
keeps (torch's TCPStore), and asks every few milliseconds whether all are there; what is then exchanged takes no longer
than the network needs. So nobody waits inside a collective for a process that never comes. Meanwhile a thread of each
process leaves a sign of life in the store and looks for those of the others: a process that fails says why there, and
one that is killed, hangs in the network or loses its machine falls silent. Either way every other process raises one
error, in the middle of long work too. None of this passes through an accelerator: NCCL and gloo behave alike.
"""

from __future__ import annotations

import _thread
import atexit
import base64
import os
import pickle
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

from hf_llfc.errors import LLFCError, ProcessError
from hf_llfc.parallel.workers import Workers

if TYPE_CHECKING:
    import torch

Value = TypeVar("Value")

SILENCE_VARIABLE = "HF_LLFC_SILENCE"
"""Environment variable: seconds without a sign of life after which a process counts as gone, instead of `SILENCE`."""

SILENCE = 60.0
"""In seconds: libraries hold Python's lock for a few at most, a crowded machine stops a process for some more."""

BEATS = 30
"""Signs of life in the time after which silence counts."""

EXCHANGE = timedelta(minutes=10)
"""What an exchange may take once all processes are there; alignments and statistics are megabytes."""

LEAVING = 5.0
"""Seconds for which the main process keeps the store open so that the others can read why a run failed."""

_LONGEST_PAUSE = 0.01


class Processes:
    """All processes that a launcher started, or the one that there is; a context in which they work together.

    On leaving with an error all other processes get it too; on leaving without one, all have got that far.

    Args:
        device: Where models run and tensors of checkpoints are summed and multiplied, see `chosen_device`. Where None,
            models run where accelerate puts them, and all else is the processor's.

    Raises:
        LLFCError: A launcher asked for several processes and accelerate sees one, the processes have no way to
            exchange Python objects (TPUs), or the device is not there.

    Example:
        with Processes() as processes:
            found = processes.on_main(search)
    """

    def __init__(self, device: str | None = None) -> None:
        import torch
        from accelerate import Accelerator

        from hf_llfc.parallel.devices import accelerator_of, chosen_device

        wanted = int(os.environ.get("WORLD_SIZE", "1"))
        accelerator = Accelerator(cpu=not torch.accelerator.is_available())
        self.rank: int = accelerator.process_index
        self.count: int = accelerator.num_processes
        self.device: torch.device = accelerator.device
        self._link: _Link | None = None
        if wanted > 1 and self.count == 1:
            raise LLFCError(
                f"the launcher started {wanted} processes, accelerate sees one; on CPU launch with "
                "`ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes N -m hf_llfc …` or torchrun"
            )
        if self.count > 1 and not torch.distributed.is_initialized():
            raise LLFCError(f"{accelerator.distributed_type}: processes share work through torch.distributed only")
        self._of_tensors: torch.device | None = None
        if device is not None:
            self.device = chosen_device(device, self.device, self.count)
            self._of_tensors = accelerator_of(self.device)

    def __enter__(self) -> Processes:
        """Lets the processes find each other."""
        if self.count > 1:
            self._link = _Link(self.rank, self.count)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Waits for the others, or tells them what went wrong."""
        link, self._link = self._link, None
        if link is None:
            return
        if error is None:
            try:
                link.meet()
            except BaseException as failure:
                error = failure
        reason = link.leave(error)
        if reason is not None and reason is not error:
            raise reason from error
        if kind is None and error is not None:
            raise error

    @property
    def is_main(self) -> bool:
        """Whether this process speaks for all."""
        return self.rank == 0

    def gather(self, value: Any) -> list[Any]:
        """The picklable values of all processes, in the order of ranks; all processes call it at the same points.

        Raises:
            LLFCError: Another process failed or is gone.
        """
        if self.count == 1:
            return [value]
        assert self._link is not None, "processes work together inside `with Processes()`"
        return self._link.gather(value)

    def barrier(self) -> None:
        """Waits until every process has got here.

        Raises:
            LLFCError: Another process failed or is gone.
        """
        if self._link is not None:
            self._link.meet()

    def workers(self) -> Workers:
        """The threads of this process, as many as torch has, and the other processes."""
        import torch

        return Workers(torch.get_num_threads(), self.rank, self.count, self.gather, self._of_tensors)

    def on_main(self, work: Callable[[], Value]) -> Value:
        """Runs work on the main process; all processes get its value, or its error."""
        if self.count == 1:
            return work()
        outcome: tuple[Value | None, Exception | None] = (None, None)
        problem: Exception | None = None
        if self.is_main:
            try:
                outcome = (work(), None)
            except Exception as error:
                problem, outcome = error, (None, _sendable(error))
        value, sent = self.gather(outcome)[0]
        if problem is not None:
            raise problem
        if sent is not None:
            raise sent
        return value

    def main_first(self, work: Callable[[], Value]) -> Value:
        """Runs work on every process, after the main one has done it: it downloads, the others find the files."""
        done: list[Value] = []
        self.on_main(lambda: done.append(work()))
        return done[0] if done else work()


class _Link:
    """How a process meets the others and learns what became of them.

    Args:
        rank: Which process this is.
        count: How many there are.
    """

    def __init__(self, rank: int, count: int) -> None:
        from torch import distributed

        self._rank = rank
        self._count = count
        self._silence = float(os.environ.get(SILENCE_VARIABLE) or SILENCE)
        self._meetings = 0
        self._failure: BaseException | None = None
        self._noticed = threading.Event()
        self._left = threading.Event()
        self._interrupt, self._handler_before = _way_to_interrupt()
        self._group = distributed.new_group(backend="gloo", timeout=EXCHANGE)
        host = os.environ.get("MASTER_ADDR", "127.0.0.1")
        timeout = timedelta(seconds=self._silence)
        port: list[Any] = [None]
        if rank == 0:
            self._store = distributed.TCPStore(host, 0, None, True, timeout, wait_for_workers=False)
            port = [self._store.port]
        distributed.broadcast_object_list(port, src=0, group=self._group)
        if rank > 0:
            self._store = distributed.TCPStore(host, port[0], None, False, timeout)
        self._store.set(f"beat/{rank}", "0")
        self.meet()
        self._watcher = threading.Thread(target=self._watch, name="hf_llfc watch", daemon=True)
        self._watcher.start()

    def meet(self) -> None:
        """Waits until every process has got as far as this one.

        Raises:
            LLFCError: What another process failed with.
            ProcessError: Another process is gone.
            KeyboardInterrupt: Another process was interrupted.
        """
        self._meetings += 1
        key = f"meeting/{self._meetings}"
        pause = 0.001
        try:
            here = self._store.add(key, 1)
            while here < self._count:
                self._raise_failure()
                time.sleep(pause)
                pause = min(2 * pause, _LONGEST_PAUSE)
                here = self._store.add(key, 0)
        except RuntimeError as error:  # of the store
            raise self._cut_off() from error

    def gather(self, value: Any) -> list[Any]:
        """The values of all processes, in the order of ranks."""
        from torch import distributed

        self.meet()
        values: list[Any] = [None] * self._count
        try:
            distributed.all_gather_object(values, value, group=self._group)
        except RuntimeError as error:
            raise ProcessError(
                f"another process ended, or the network failed, during an exchange ({str(error).splitlines()[0]}); run"
                " the same again"
            ) from error
        return values

    def leave(self, error: BaseException | None) -> BaseException | None:
        """Ends the watch and, after an error, tells the others.

        Args:
            error: What this process ends with.

        Returns:
            What it should end with: what another process failed with, where that is why this one was interrupted.
        """
        self._noticed.set()
        self._left.set()
        if self._failure is not None and isinstance(error, KeyboardInterrupt | RuntimeError):
            error = self._failure
        with suppress(RuntimeError):  # the store is gone with the main process
            if error is not None and self._store.add("failures", 1) == 1:
                self._store.set("failure", base64.b64encode(pickle.dumps(self._told(error))).decode())
            gone = self._store.add("left", 1)
            deadline = time.monotonic() + LEAVING
            while self._rank == 0 and gone < self._count and time.monotonic() < deadline:
                time.sleep(0.01)
                gone = self._store.add("left", 0)
        self._watcher.join(timeout=LEAVING)
        if error is None:
            from torch import distributed

            distributed.destroy_process_group(self._group)
            atexit.register(_end_groups)
        if self._handler_before is not None and self._interrupt is not None:
            signal.signal(self._interrupt, self._handler_before)
        return error

    def _told(self, error: BaseException) -> BaseException:
        """What the other processes should end with when this one ends with an error."""
        if isinstance(error, KeyboardInterrupt):
            return KeyboardInterrupt()
        if isinstance(error, Exception):
            return _sendable(error)
        return ProcessError(f"process {self._rank} of {self._count} was stopped; run the same again", self._rank)

    def _raise_failure(self) -> None:
        if self._failure is not None:
            self._noticed.set()
            raise self._failure

    def _cut_off(self) -> BaseException:
        """What there is to say when the store does not answer."""
        self._noticed.set()
        if self._failure is None:
            self._failure = self._lost(0)
        return self._failure

    def _lost(self, rank: int) -> ProcessError:
        return ProcessError(
            f"process {rank} of {self._count} ended or cannot be reached any more; see what the launcher says of it"
            " (out of memory?), and run the same again",
            rank,
        )

    def _watch(self) -> None:
        """Leaves signs of life, and looks for failures and for processes that have fallen silent."""
        others = [rank for rank in range(self._count) if rank != self._rank]
        heard = dict.fromkeys(others, (b"", time.monotonic()))
        beats = 0
        while not self._left.wait(self._silence / BEATS):
            beats += 1
            try:
                self._store.set(f"beat/{self._rank}", str(beats))
                if self._store.check(["failure"]):
                    # It comes from a process of this very run.
                    self._end(pickle.loads(base64.b64decode(self._store.get("failure"))))
                    return
                found = self._store.multi_get([f"beat/{rank}" for rank in others])
            except RuntimeError:
                self._end(self._failure or self._lost(0))
                return
            now = time.monotonic()
            for rank, beat in zip(others, found, strict=True):
                if beat != heard[rank][0]:
                    heard[rank] = (beat, now)
                elif now - heard[rank][1] > self._silence:
                    self._end(self._lost(rank))
                    return

    def _end(self, failure: BaseException) -> None:
        """Ends this process: by itself at its next meeting, by an interrupt in long work, or at once if it hangs."""
        self._failure = failure
        if self._noticed.wait(1.0):
            return
        if self._interrupt is not None:
            _thread.interrupt_main(self._interrupt)
        if not self._left.wait(self._silence):
            print(f"hf-llfc: error: process {self._rank}: {failure}", file=sys.stderr, flush=True)
            os._exit(1)


def _end_groups() -> None:
    """Ends the threads of torch's groups of processes while Python can still wait for them.

    A process that leaves this to the end of its interpreter may abort there, after all its work.
    """
    from torch import distributed

    if distributed.is_initialized():
        distributed.destroy_process_group()


def _way_to_interrupt() -> tuple[signal.Signals | None, Any]:
    """The signal whose handler raises `KeyboardInterrupt` in the main thread, none elsewhere.

    A shell starts what it runs in the background with the interrupt ignored, and this stays so for a terminal's; within
    the process another signal then stands in for it.

    Returns:
        The signal, and the handler to put back in its place, if one was taken.
    """
    if threading.current_thread() is not threading.main_thread():
        return None, None
    if callable(signal.getsignal(signal.SIGINT)) or sys.platform == "win32":
        return signal.SIGINT, None
    return signal.SIGUSR1, signal.signal(signal.SIGUSR1, signal.default_int_handler)


def _sendable(error: Exception) -> Exception:
    """An error as another process may get it: not every one of a library can be sent."""
    return error if isinstance(error, LLFCError) else RuntimeError(f"{type(error).__name__}: {error}")
