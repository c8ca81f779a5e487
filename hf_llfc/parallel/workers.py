"""Where independent pieces of work are done: threads or copies of this process, and the processes of a launcher.

Whoever has many pieces that do not need each other's results gives them to `Workers.map` and gets the results in the
order of the pieces, the same on every process. What a piece computes does not depend on who computes it, so that the
result of a run does not depend on how many threads and processes there are.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from hf_llfc.parallel.forked import can_fork, run_forked

if TYPE_CHECKING:  # takes long to load
    from torch import Tensor, device

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
        gather: Sends a value to all processes and returns those of all, in the order of ranks; every process calls it
            at the same points. See `hf_llfc.parallel.messages.pack` for what a value may be.
        device: The accelerator of this process where tensors of checkpoints are summed and multiplied; None where that
            is done by the processor.
    """

    threads: int = 1
    rank: int = 0
    ranks: int = 1
    gather: Callable[[Any], list[Any]] = _alone
    device: device | None = None

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
            function: The work; with several processes its results must be what `hf_llfc.parallel.messages.pack` takes.
            items: What to work on, the same on every process.
            costs: How much work each is, in any unit; alike where None.
            on_done: Called after every item of this process, one call at a time.

        Returns:
            The results in the order of the items, the same on every process.

        Raises:
            LLFCError: Work failed, here or on another process; all processes get the error.
        """
        mine = self._share(items, costs)

        def work() -> dict[int, Result]:
            return dict(zip(mine, self._map_here(function, [items[place] for place in mine], on_done), strict=True))

        results = {place: result for found in self._together(work) for place, result in found.items()}
        return [results[place] for place in range(len(items))]

    def sum(self, function: Callable[[Item], Tensor | None], items: Sequence[Item]) -> Tensor | None:
        """Adds up a tensor an item, in an order that does not depend on who computes them.

        The sum is a tree: of the first half of the items and of the second, and so on. A process makes a branch of it,
        so that it sends one tensor however many items there are.

        Args:
            function: Gives the tensor of an item, which is its own to change, or None where there is nothing to add.
            items: Alike in cost, the same on every process.

        Returns:
            The sum, the same on every process; None of nothing.

        Raises:
            LLFCError: Work failed, here or on another process; all processes get the error.
        """
        whole = range(len(items))
        branches = dict(_branches(whole, range(self.ranks)))
        device = None

        def add(branch: range) -> Tensor | None:
            if self.threads == 1:  # one after the other, so that no more of them are in memory than the tree is deep
                return _tree(branch, lambda leaf: function(items[leaf[0]]))
            made = self._map_here(function, [items[place] for place in branch], None)
            return _tree(branch, lambda leaf: made[branch.index(leaf[0])])

        def work() -> Any:
            nonlocal device
            branch = branches.get(self.rank)
            total = add(branch) if branch else None
            if total is None or self.ranks == 1:
                return total
            device = total.device
            return total.cpu()

        outcomes = self._together(work)
        if self.ranks == 1:
            return outcomes[0]
        of_branch = {
            branch: None if outcomes[rank] is None else outcomes[rank].to(device) for rank, branch in branches.items()
        }
        return _tree(whole, of_branch.__getitem__, of_branch)

    def each(
        self,
        function: Callable[[Item], Result],
        items: Sequence[Item],
        *,
        on_result: Callable[[Item, Result], None],
        costs: Sequence[float] | None = None,
        forked: bool = False,
    ) -> None:
        """Does work on every item, whose results only the process that did it needs.

        Args:
            function: The work.
            items: What to work on, the same on every process.
            on_result: Told what came of an item of this process, by the thread that did it.
            costs: How much work each is, in any unit; alike where None.
            forked: Whether copies of this process take the place of its threads, where `can_fork` and there is no
                accelerator, which a copy cannot use: what they change in memory is not seen here. `run_forked` says
                what else the function must keep to.

        Raises:
            LLFCError: Work failed, here or on another process; all processes get the error.
        """
        mine = [items[place] for place in self._share(items, costs)]

        def work() -> None:
            if forked and self.device is None and self.threads > 1 and len(mine) > 1 and can_fork():
                run_forked(function, mine, self.threads, on_result)
            else:
                self._map_here(lambda item: on_result(item, function(item)), mine, None)

        self._together(work)

    def _share(self, items: Sequence[Item], costs: Sequence[float] | None) -> list[int]:
        """The places of the items that are this process's."""
        owners = _owners([1.0] * len(items) if costs is None else costs, self.ranks)
        return [place for place, owner in enumerate(owners) if owner == self.rank]

    def _together(self, work: Callable[[], Result]) -> list[Result]:
        """What work gives on every process; all raise the error of any."""
        if self.ranks == 1:
            return [work()]
        problem: Exception | None = None
        done: Result | None = None
        try:
            done = work()
        except Exception as error:
            problem = error
        outcomes = self.gather((done, problem))
        if problem is not None:
            raise problem
        for _, elsewhere in outcomes:
            if elsewhere is not None:
                raise elsewhere
        return [found for found, _ in outcomes]

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


def _halves(part: range) -> tuple[range, range]:
    middle = (len(part) + 1) // 2
    return part[:middle], part[middle:]


def _branches(items: range, ranks: range) -> Iterator[tuple[int, range]]:
    """Which process makes which branch of a tree; those for whom nothing is left make none."""
    if len(ranks) < 2 or len(items) < 2:
        yield ranks[0], items
        return
    for some, their in zip(_halves(items), _halves(ranks), strict=True):
        yield from _branches(some, their)


def _tree(part: range, value: Callable[[range], Tensor | None], known: Collection[range] = ()) -> Tensor | None:
    """The sum of a branch, from the values of its leaves: of single items, and of the branches that are known."""
    if len(part) == 1 or part in known:
        return value(part)
    left, right = (_tree(half, value, known) for half in _halves(part))
    if left is None or right is None:
        return right if left is None else left
    return left.add_(right)


def largest_share(costs: Sequence[float], ranks: int) -> float:
    """What the process has to do that has most, where several make a `Workers.sum`.

    Args:
        costs: Of the items, in any unit.
        ranks: How many processes there are.
    """
    return max(sum(costs[place] for place in branch) for _, branch in _branches(range(len(costs)), range(ranks)))


def _owners(costs: Sequence[float], ranks: int) -> list[int]:
    """Which process does which item: the most expensive first, each to the one with the least to do."""
    loads = [0.0] * ranks
    owners = [0] * len(costs)
    for place in sorted(range(len(costs)), key=lambda place: -costs[place]):
        owners[place] = min(range(ranks), key=loads.__getitem__)
        loads[owners[place]] += costs[place]
    return owners
