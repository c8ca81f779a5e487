"""The processes of a run: who does what, who waits for whom, and how all of them end when one fails.

Processes wait for each other in one way only: they *meet*. Each counts itself in at the store of the launcher (torch's
TCPStore), and asks every few milliseconds whether all are there; what is then exchanged takes no longer than the
network needs. So nobody waits inside a collective for a process that never comes, and an interrupt ends a wait at once.
A thread of each process leaves a sign of life in the store. Who waits reads there why another one failed, or sees that
it has fallen silent: it was killed, hangs, or lost its machine. None of this passes through an accelerator.

Whatever crosses is JSON or a tensor, and signed: see `hf_llfc.parallel.messages`. The store answers everyone who
reaches its port, so that what lies in it can delay or end a run, and can do no more.
"""

from __future__ import annotations

import atexit
import logging
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

from hf_llfc.errors import LLFCError, ProcessError
from hf_llfc.parallel.workers import Workers

if TYPE_CHECKING:
    import torch

Value = TypeVar("Value")

logger = logging.getLogger(__name__)

SILENCE_VARIABLE = "HF_LLFC_SILENCE"
"""Environment variable: seconds without a sign of life after which a process counts as gone, instead of `SILENCE`."""

SILENCE = 60.0
"""In seconds: libraries hold Python's lock for a few at most, a crowded machine stops a process for some more."""

BEATS = 30
"""Signs of life in the time after which silence counts."""

EXCHANGE = timedelta(minutes=10)
"""What an exchange may take once all processes are there; alignments and statistics are megabytes."""

LEAVING = 5.0
"""Seconds that a process which ends with an error gives the others to read it."""

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
        with _on_loopback(wanted):  # of processors alone, the group of all is gloo's too
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
                link.leave(failure)
                raise
        link.leave(error)

    @property
    def is_main(self) -> bool:
        """Whether this process speaks for all."""
        return self.rank == 0

    def gather(self, value: Any) -> list[Any]:
        """The values of all processes, in the order of ranks; all processes call it at the same points.

        Args:
            value: Made of what `hf_llfc.parallel.messages.pack` takes.

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
                problem, outcome = error, (None, error)
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

    Raises:
        ProcessError: The processes have no store or no secret in common.
    """

    def __init__(self, rank: int, count: int) -> None:
        from torch import distributed

        from hf_llfc.parallel.messages import shared_secret

        self._rank = rank
        self._count = count
        self._others = [other for other in range(count) if other != rank]
        self._silence = float(os.environ.get(SILENCE_VARIABLE) or SILENCE)
        self._meetings = 0
        self._received: BaseException | None = None
        self._left = threading.Event()
        with _on_loopback(count):
            self._group = distributed.new_group(backend="gloo", timeout=EXCHANGE)
        # A number that each has drawn: what was signed in another run is worth nothing in this one.
        drawn = b"".join(self._exchange(secrets.token_bytes(16)))
        self._key = shared_secret() + drawn
        self._store = distributed.PrefixStore(f"hf_llfc/{drawn.hex()}", _launchers_store(self._silence))
        self._store.set(f"beat/{rank}", "0")
        self.gather(None)
        self._heart = threading.Thread(target=self._beat, name="hf_llfc beat", daemon=True)
        self._heart.start()

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
        heard: dict[int, tuple[bytes, float]] = {}
        asked = time.monotonic()
        try:
            here = self._store.add(key, 1)
            while here < self._count:
                if (failure := self._failure()) is not None:
                    raise failure
                now = time.monotonic()
                if now - asked > self._silence / BEATS:
                    # A machine that slept, or a terminal that stopped all processes, says nothing about the others.
                    heard = self._listened(heard if now - asked < self._silence / 2 else {}, now)
                    asked = now
                time.sleep(pause)
                pause = min(2 * pause, _LONGEST_PAUSE)
                here = self._store.add(key, 0)
        except RuntimeError as error:
            if error is self._received:
                raise
            raise self._lost(0) from error  # the store is gone

    def gather(self, value: Any) -> list[Any]:
        """The values of all processes, in the order of ranks."""
        import torch

        from hf_llfc.parallel.messages import is_signed, pack, sign, unpack

        message = pack(value)
        self.meet()
        about = f"{self._meetings} of %d"
        mine = len(message).to_bytes(8, "little") + sign(self._key, about % self._rank, message)
        try:
            starts = self._exchange(mine)
            messages = [torch.empty(int.from_bytes(start[:8], "little"), dtype=torch.uint8) for start in starts]
            messages[self._rank] = message
            for rank in range(self._count):
                torch.distributed.broadcast(messages[rank], src=rank, group=self._group)
        except RuntimeError as error:
            with suppress(RuntimeError):  # the store may be gone too
                self._failure()
            if self._received is not None:
                raise self._received from error
            raise ProcessError(
                f"another process ended, or the network failed, during an exchange ({str(error).splitlines()[0]}); run"
                " the same again"
            ) from error
        for rank in range(self._count):
            if not is_signed(self._key, about % rank, messages[rank], starts[rank][8:]):
                raise self._unsigned(rank)
        return [unpack(each) for each in messages]

    def leave(self, error: BaseException | None) -> None:
        """Ends the signs of life and, after an error, tells the others.

        Args:
            error: What this process ends with.
        """
        self._left.set()
        is_first = error is not None and error is not self._received
        with suppress(RuntimeError):  # the store is gone with the launcher, or with the main process
            if error is not None and is_first:
                self._tell(error)
            gone = self._store.add("left", 1)
            is_stopped = error is not None and not isinstance(error, Exception | KeyboardInterrupt)
            patience = LEAVING if (is_first or self._rank == 0) and not is_stopped else 0.0  # the store may be its own
            deadline = time.monotonic() + patience
            while gone < self._count and time.monotonic() < deadline:
                time.sleep(0.01)
                gone = self._store.add("left", 0)
            if gone < self._count and is_first and patience and self._rank > 0:
                logger.warning("process %d of %d ends before the others: %s", self._rank, self._count, error)
        self._heart.join(timeout=LEAVING)
        if error is None:
            from torch import distributed

            distributed.destroy_process_group(self._group)
            atexit.register(_end_groups)

    def _exchange(self, mine: bytes) -> list[bytes]:
        """As many bytes of every process, in the order of ranks."""
        import torch

        sent = torch.frombuffer(bytearray(mine), dtype=torch.uint8)
        found = [torch.empty_like(sent) for _ in range(self._count)]
        torch.distributed.all_gather(found, sent, group=self._group)
        return [each.numpy().tobytes() for each in found]

    def _tell(self, error: BaseException) -> None:
        """Leaves in the store what the other processes should end with when this one ends with an error."""
        from hf_llfc.parallel.messages import pack, sign

        if not isinstance(error, Exception | KeyboardInterrupt):
            error = ProcessError(f"process {self._rank} of {self._count} was stopped; run the same again", self._rank)
        message = pack(error)
        signed = sign(self._key, f"failure of {self._rank}", message) + message.numpy().tobytes()
        self._store.set(f"failure/{self._rank}", signed.hex())
        self._store.add("failures", 1)

    def _failure(self) -> BaseException | None:
        """What another process failed with; what none of them has signed is no failure of theirs."""
        import torch

        from hf_llfc.parallel.messages import DIGEST_SIZE, is_signed, unpack

        if not self._store.add("failures", 0):
            return None
        for rank in self._others:
            if not self._store.check([f"failure/{rank}"]):
                continue
            try:
                signed = bytearray.fromhex(self._store.get(f"failure/{rank}").decode())
            except ValueError:
                continue
            if len(signed) <= DIGEST_SIZE:
                continue
            message = torch.frombuffer(signed, dtype=torch.uint8)[DIGEST_SIZE:]
            if is_signed(self._key, f"failure of {rank}", message, bytes(signed[:DIGEST_SIZE])):
                self._received = unpack(message)
                return self._received
        return None

    def _listened(self, heard: dict[int, tuple[bytes, float]], now: float) -> dict[int, tuple[bytes, float]]:
        """The last sign of life of every other process, and when it was first seen.

        Raises:
            ProcessError: One of them has been silent for too long.
        """
        keys = [f"beat/{rank}" for rank in self._others]
        found = self._store.multi_get(keys) if self._store.check(keys) else [b""] * len(keys)
        for rank, beat in zip(self._others, found, strict=True):
            last, since = heard.get(rank, (None, now))
            if beat != last:
                heard[rank] = (beat, now)
            elif now - since > self._silence:
                raise self._lost(rank)
        return heard

    def _lost(self, rank: int) -> ProcessError:
        return ProcessError(
            f"process {rank} of {self._count} ended or cannot be reached any more; see what the launcher says of it"
            " (out of memory?), and run the same again",
            rank,
        )

    def _unsigned(self, rank: int) -> ProcessError:
        from hf_llfc.parallel.messages import SECRET_VARIABLE

        return ProcessError(
            f"process {rank} of {self._count} does not know the secret of this run, or another program stands in its"
            f" place; set {SECRET_VARIABLE} to the same long random text for all processes, and run the same again"
        )

    def _beat(self) -> None:
        """Leaves signs of life."""
        beats = 0
        while not self._left.wait(self._silence / BEATS):
            beats += 1
            try:
                self._store.set(f"beat/{self._rank}", str(beats))
            except RuntimeError:  # the store is gone, which the next meeting tells
                return


def _launchers_store(patience: float) -> torch.distributed.TCPStore:
    """The store at which the launcher let the processes find each other.

    Args:
        patience: Seconds for which it may keep one waiting.
    """
    from torch import distributed

    host, port = os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT", "")
    try:
        return distributed.TCPStore(host, int(port), None, False, timedelta(seconds=patience))
    except (RuntimeError, ValueError) as error:
        raise ProcessError(
            f"the launcher's store cannot be reached at {host or '?'}:{port or '?'} ({str(error).splitlines()[0]}); "
            "MASTER_ADDR and MASTER_PORT must name it"
        ) from None


@contextmanager
def _on_loopback(count: int) -> Iterator[None]:
    """Lets gloo listen where only this machine can reach it, if all processes are here and no network is named."""
    name = "GLOO_SOCKET_IFNAME"
    loopback = next((each for _, each in socket.if_nameindex() if each in ("lo", "lo0")), None)
    if loopback is None or name in os.environ or os.environ.get("LOCAL_WORLD_SIZE") != str(count):
        yield
        return
    os.environ[name] = loopback
    try:
        yield
    finally:
        del os.environ[name]


def _end_groups() -> None:
    """Ends the threads of torch's groups of processes while Python can still wait for them.

    A process that leaves this to the end of its interpreter may abort there, after all its work.
    """
    from torch import distributed

    if distributed.is_initialized():
        distributed.destroy_process_group()
