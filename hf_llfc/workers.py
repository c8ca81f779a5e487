"""Where independent pieces of work are done: threads of this process, and the processes of a launcher.

Whoever has many pieces that do not need each other's results gives them to `Workers.map` and gets the results in the
order of the pieces, the same on every process. What a piece computes does not depend on who computes it, so that the
result of a run does not depend on how many threads and processes there are.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

from hf_llfc.errors import LLFCError

Item = TypeVar("Item")
Result = TypeVar("Result")


def _alone(value: Any) -> list[Any]:
    return [value]


@dataclass(frozen=True)
class Workers:
    """Threads of one process, and which of how many processes it is.

    Attributes:
        threads: How many pieces this process works on at a time; each computes with one thread of torch then. With one
            thread, torch is left as it is.
        rank: Which process this is.
        ranks: How many there are.
        gather: Sends a picklable value to all processes and returns those of all, in the order of ranks; every
            process calls it at the same points.
    """

    threads: int = 1
    rank: int = 0
    ranks: int = 1
    gather: Callable[[Any], list[Any]] = _alone

    def map(
        self,
        function: Callable[[Item], Result],
        items: Sequence[Item],
        *,
        costs: Sequence[float] | None = None,
        on_done: Callable[[], None] | None = None,
    ) -> list[Result]:
        """Does work on every item.

        Args:
            function: The work; with several processes its results must be picklable.
            items: What to work on, the same on every process.
            costs: How much work each is, in any unit; alike where None.
            on_done: Called after every item of this process, one call at a time.

        Returns:
            The results in the order of the items, the same on every process.

        Raises:
            LLFCError: Work failed, here or on another process; all processes get the error.
        """
        owners = _owners([1.0] * len(items) if costs is None else costs, self.ranks)
        mine = [place for place, owner in enumerate(owners) if owner == self.rank]
        problem: Exception | None = None
        done: dict[int, Result] = {}
        try:
            done = dict(zip(mine, self._map_here(function, [items[place] for place in mine], on_done), strict=True))
        except Exception as error:
            if self.ranks == 1:
                raise
            problem = error
        # Not every error of a library can be sent.
        is_ours = problem is None or isinstance(problem, LLFCError)
        outcomes = self.gather((done, problem if is_ours else RuntimeError(f"{type(problem).__name__}: {problem}")))
        if problem is not None:
            raise problem
        results: dict[int, Result] = {}
        for found, elsewhere in outcomes:
            if elsewhere is not None:
                raise elsewhere
            results |= found
        return [results[place] for place in range(len(items))]

    def _map_here(
        self, function: Callable[[Item], Result], items: Sequence[Item], on_done: Callable[[], None] | None
    ) -> list[Result]:
        """The results of this process's share."""
        lock = threading.Lock()

        def work(item: Item) -> Result:
            result = function(item)
            if on_done is not None:
                with lock:
                    on_done()
            return result

        threads = min(self.threads, len(items))
        if threads < 2:
            return [work(item) for item in items]
        import torch

        # The number of torch's threads belongs to the thread that sets it, and is what later threads begin with.
        of_torch = torch.get_num_threads()
        pool = ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,))
        try:
            return list(pool.map(work, items))
        finally:
            pool.shutdown(cancel_futures=True)
            torch.set_num_threads(of_torch)


ALONE = Workers()
"""One process that does one piece after the other."""


def _owners(costs: Sequence[float], ranks: int) -> list[int]:
    """Which process does which item: the most expensive first, each to the one with the least to do."""
    loads = [0.0] * ranks
    owners = [0] * len(costs)
    for place in sorted(range(len(costs)), key=lambda place: -costs[place]):
        owners[place] = min(range(ranks), key=loads.__getitem__)
        loads[owners[place]] += costs[place]
    return owners
