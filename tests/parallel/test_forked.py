"""Work in forked copies: done once, told here, ended with whoever asked for it."""

import errno
import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest
import torch

from hf_llfc.errors import AlignmentError, ProcessError
from hf_llfc.parallel.forked import can_fork, run_forked
from hf_llfc.parallel.workers import Workers

pytestmark = pytest.mark.skipif(not can_fork(), reason="the system's libraries do not stand a fork")


def told(function, items, count=2):
    """What came of every item."""
    found = []
    run_forked(function, items, count, lambda item, result: found.append((item, result)))
    return sorted(found)


def children():
    """The processes that this one has started and not yet seen end."""
    return (
        subprocess.run(["ps", "--ppid", str(os.getpid()), "-o", "args="], capture_output=True, text=True)
        .stdout.replace("ps --ppid", "")
        .count(sys.executable)
    )


@pytest.mark.parametrize("count", [1, 2, 5])
def test_every_item_is_done_once_elsewhere(count):
    found = told(lambda item: (item**2, os.getpid()), range(40), count)
    assert [(item, square) for item, (square, _) in found] == [(item, item**2) for item in range(40)]
    done_by = {pid for _, (_, pid) in found}
    assert os.getpid() not in done_by and 1 <= len(done_by) <= count
    assert told(str, [], count) == []


def test_copies_compute_after_this_process_has_used_its_threads():
    torch.randn(600, 600) @ torch.randn(600, 600)
    matrix = torch.arange(1e6).reshape(1000, 1000)
    found = told(
        lambda item: (torch.get_num_threads(), (matrix * item).sum().item(), (matrix @ matrix)[0, 0].item()), [1, 2]
    )
    assert [threads for _, (threads, *_) in found] == [1, 1]
    assert found[1][1][1] == pytest.approx(2 * found[0][1][1])
    assert children() == 0


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (AlignmentError("item 3 is at fault"), AlignmentError),
        (OSError(errno.ENOSPC, "No space left on device"), OSError),
        (ZeroDivisionError("by zero"), ZeroDivisionError),
    ],
)
def test_an_error_is_what_it_was(error, expected, threads):
    def fail(item):
        if item == 3:
            raise error
        return item

    with pytest.raises(expected, match=str(error.args[-1])) as raised:
        Workers(threads).each(fail, range(9), on_result=lambda item, result: None, forked=True)
    assert getattr(raised.value, "errno", None) == getattr(error, "errno", None)
    assert children() == 0


def test_an_error_that_cannot_be_sent_is_told():
    class Local(Exception):
        pass

    def fail(item):
        raise Local(f"item {item}")

    with pytest.raises(RuntimeError, match="Local: item 0"):
        told(fail, [0], 1)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_copy_that_is_killed_is_an_error(number):
    def work(item):
        if item == 5:
            os.kill(os.getpid(), number)
        time.sleep(0.01)
        return item

    with pytest.raises(ProcessError, match=f"signal {int(number)}"):
        told(work, range(30))
    assert children() == 0


def test_a_copy_that_leaves_is_an_error():
    with pytest.raises(ProcessError, match="exit code 3"):
        told(lambda item: os._exit(3), range(4))


def test_a_copy_makes_no_copies():
    def work(item):
        found = []
        Workers(2).each(lambda each: os.getpid(), range(4), on_result=lambda _, pid: found.append(pid), forked=True)
        return set(found) == {os.getpid()}

    assert [result for _, result in told(work, range(2))] == [True, True]


SCRIPT = """
import os, sys, time
from pathlib import Path
from hf_llfc.parallel.forked import run_forked

def work(item):
    Path(sys.argv[1], str(os.getpid())).touch()
    time.sleep(0.2)

run_forked(work, range(1000), 2, lambda item, result: None)
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_copies_end_with_their_parent(tmp_path, number):
    parent = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(SCRIPT), str(tmp_path)],
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    deadline = time.monotonic() + 60
    while len(list(tmp_path.iterdir())) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    copies = [int(path.name) for path in tmp_path.iterdir()]
    assert len(copies) == 2
    for pid in copies:
        os.kill(pid, signal.SIGINT)  # as a terminal would: they leave it to their parent
    parent.send_signal(number)
    _, printed = parent.communicate(timeout=30)
    assert parent.returncode == -number
    assert printed.count("Traceback") == (number == signal.SIGINT)
    while any(map(is_running, copies)) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not any(map(is_running, copies))


def is_running(pid):
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
