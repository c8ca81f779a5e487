import threading

import pytest
import torch

from hf_llfc.errors import AlignmentError
from hf_llfc.parallel.messages import pack, unpack
from hf_llfc.parallel.workers import ALONE, Workers, largest_share


class Together:
    """`gather` for processes that are threads of this one."""

    def __init__(self, ranks: int) -> None:
        self.barrier = threading.Barrier(ranks, timeout=30)
        self.values: list = [None] * ranks

    def of(self, rank: int, threads: int = 1) -> Workers:
        def gather(value):
            self.values[rank] = pack(value)
            self.barrier.wait()
            found = [unpack(each.clone()) for each in self.values]
            self.barrier.wait()
            return found

        return Workers(threads, rank, len(self.values), gather)


def on_all(ranks: int, work, threads: int = 1) -> list:
    """What work returns or raises on every rank."""
    together = Together(ranks)
    outcomes: list = [None] * ranks

    def run(rank: int) -> None:
        try:
            outcomes[rank] = work(together.of(rank, threads))
        except Exception as error:
            outcomes[rank] = error

    running = [threading.Thread(target=run, args=(rank,)) for rank in range(ranks)]
    for each in running:
        each.start()
    for each in running:
        each.join(60)
    return outcomes


@pytest.mark.parametrize("threads", [1, 3])
def test_results_come_in_order(threads):
    assert Workers(threads).map(lambda item: item**2, range(20)) == [item**2 for item in range(20)]
    assert ALONE.map(str, []) == []


@pytest.mark.parametrize(("ranks", "threads"), [(2, 1), (3, 2)])
def test_every_item_is_done_once_and_known_to_all(ranks, threads):
    done: list[int] = []

    def work(item: int) -> int:
        done.append(item)
        return item**2

    costs = [100.0, *[1.0] * 9]
    found = on_all(ranks, lambda workers: workers.map(work, range(10), costs=costs), threads)
    assert found == [[item**2 for item in range(10)]] * ranks
    assert sorted(done) == list(range(10))


def test_an_expensive_item_is_all_that_its_process_does():
    done: dict[int, list[int]] = {0: [], 1: []}
    on_all(2, lambda workers: workers.map(done[workers.rank].append, [0, 1, 2, 3], costs=[1, 1, 5, 1]))
    assert sorted(done.values()) == [[0, 1, 3], [2]]


@pytest.mark.parametrize("count", [0, 1, 2, 3, 8, 11])
@pytest.mark.parametrize("empty", [set(), {0}, {1, 2, 7}])
def test_a_sum_does_not_depend_on_who_makes_it(count, empty, generator):
    tensors = [torch.randn(5, generator=generator) * 10.0**place for place in range(count)]

    def give(place: int) -> torch.Tensor | None:
        return None if place in empty else tensors[place].clone()

    alone = ALONE.sum(give, range(count))
    left = [tensors[place] for place in range(count) if place not in empty]
    assert (alone is None) == (not left)
    if left:
        torch.testing.assert_close(alone.double(), torch.stack(left).double().sum(0))
    for ranks, threads in ((1, 3), (2, 1), (3, 2), (5, 1), (16, 1)):
        for found in on_all(ranks, lambda workers: workers.sum(give, range(count)), threads):
            assert (found is None and alone is None) or torch.equal(found, alone)


def test_the_largest_share_of_a_sum():
    assert [largest_share([1, 1, 1, 1], ranks) for ranks in (1, 2, 3, 4, 9)] == [4, 2, 2, 1, 1]
    assert [largest_share([1, 1, 1], ranks) for ranks in (1, 2, 3)] == [3, 2, 1]


def test_an_error_reaches_all_processes():
    def fail(item: int) -> int:
        if item == 1:
            raise AlignmentError("item 1 is at fault")
        return item

    for outcome in on_all(2, lambda workers: workers.map(fail, range(4))):
        assert isinstance(outcome, AlignmentError) and str(outcome) == "item 1 is at fault"
    for outcome in on_all(2, lambda workers: workers.map(lambda item: 1 // item, range(4))):
        assert isinstance(outcome, ZeroDivisionError | RuntimeError) and "division" in str(outcome)


def test_threads_of_torch_are_those_of_before():
    before = torch.get_num_threads()
    seen = Workers(2).map(lambda _: torch.get_num_threads(), range(4))
    assert seen == [1] * 4 and torch.get_num_threads() == before
    finished: list[int] = []
    Workers(2).map(lambda item: item, range(5), on_done=lambda: finished.append(1))
    assert len(finished) == 5
