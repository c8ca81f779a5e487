"""The processes of a run. With `pipeline`, the one place that knows accelerate."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from hf_llfc.errors import LLFCError

if TYPE_CHECKING:
    from accelerate import Accelerator

    from hf_llfc.checkpoints import OutputFolder

Value = TypeVar("Value")

# Matching a large pair on the main process takes hours; the others wait for it.
PATIENCE = timedelta(days=2)


class Processes:
    """All processes that a launcher started, or the one that there is.

    Raises:
        LLFCError: A launcher asked for several processes and accelerate sees one.
    """

    def __init__(self) -> None:
        import torch
        from accelerate import Accelerator
        from accelerate.utils import InitProcessGroupKwargs

        wanted = int(os.environ.get("WORLD_SIZE", "1"))
        on_cpu = not torch.accelerator.is_available()
        self.accelerator: Accelerator = Accelerator(
            cpu=on_cpu, kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE)]
        )
        if wanted > 1 and self.accelerator.num_processes == 1:
            raise LLFCError(
                f"the launcher started {wanted} processes, accelerate sees one; on CPU launch with "
                "`ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes N -m hf_llfc …` or torchrun"
            )

    @property
    def is_main(self) -> bool:
        """Whether this process reads, matches and writes for all."""
        return bool(self.accelerator.is_main_process)

    def on_main(self, work: Callable[[], Value]) -> Value:
        """Runs work on the main process; all processes get its value, or its error."""
        if self.accelerator.num_processes == 1:
            return work()
        from accelerate.utils import broadcast_object_list

        outcome: list[tuple[Value | None, BaseException | None] | None] = [None]
        if self.is_main:
            try:
                outcome = [(work(), None)]
            except LLFCError as error:
                outcome = [(None, error)]
            except Exception as error:  # of a library; not every one of them can be sent
                broadcast_object_list([(None, RuntimeError(f"{type(error).__name__}: {error}"))], from_process=0)
                raise
        broadcast_object_list(outcome, from_process=0)
        assert outcome[0] is not None
        value, problem = outcome[0]
        if problem is not None:
            raise problem
        return value  # type: ignore[return-value]

    def main_first(self, work: Callable[[], Value]) -> Value:
        """Runs work on every process, after the main one has done it: it downloads, the others find the files."""
        done: list[Value] = []
        self.on_main(lambda: done.append(work()))
        return done[0] if done else work()

    @contextmanager
    def output(self, folder: OutputFolder) -> Iterator[Path]:
        """The staging folder of an output; the main process makes and finishes it."""
        staging = self.on_main(folder.__enter__)
        try:
            yield staging
        except BaseException as error:
            if self.is_main:
                folder.__exit__(type(error), error, error.__traceback__)
            raise
        self.on_main(lambda: folder.__exit__(None, None, None))
