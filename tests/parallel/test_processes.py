"""Processes of a launcher: what they share, and that all of them end when one does."""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from hf_llfc.parallel.processes import SILENCE_VARIABLE
from tests.parallel.processes_script import LONG

ROOT = Path(__file__).parents[2]
SCRIPT = Path(__file__).with_name("processes_script.py")

LONGEST = 100.0
"""Seconds for what ends in ten; much less than what a process does that is not told to stop."""


def run_two(what: str, folder: Path, *, silence: float) -> list[object]:
    """What two processes came to that no launcher looks after; None for one that wrote nothing."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        SILENCE_VARIABLE: str(silence),
    }
    words = [sys.executable, str(SCRIPT), what, str(folder)]
    running = [
        subprocess.Popen(words, env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}, stderr=subprocess.DEVNULL)
        for rank in range(2)
    ]
    try:
        for process, each in zip(running, what.split(","), strict=True):
            if each != "frozen":
                process.wait(LONGEST)
    finally:
        for process in running:
            process.send_signal(signal.SIGKILL)
            process.wait()
    files = [folder / f"{rank}.json" for rank in range(2)]
    return [json.loads(file.read_text()) if file.exists() else None for file in files]


@pytest.mark.timeout(200)
def test_processes_share_values_work_and_errors(tmp_path):
    first, second = run_two("share,share", tmp_path, silence=60)
    assert first["calls"] == ["on_main", "main_first"] and second["calls"] == ["main_first"]
    assert (first["on_main"], second["on_main"]) == (0, 0)
    assert (first["main_first"], second["main_first"]) == (0, 1)
    for found in (first, second):
        assert found["gather"] == [["from", 0], ["from", 1]]
        assert found["map"] == [0, 1, 4, 9, 16, 25, 36]
    ours = ["AlignmentError", "-1 is negative"], ["AlignmentError", "-3 is negative"]
    divided = "integer division or modulo by zero"
    assert first["errors"] == [ours[0], ["ZeroDivisionError", divided], ours[1]]
    assert second["errors"] == [ours[0], ["RuntimeError", f"ZeroDivisionError: {divided}"], ours[1]]


@pytest.mark.timeout(200)
@pytest.mark.parametrize("meanwhile", ["wait", "work"])
@pytest.mark.parametrize("failing", [0, 1])
def test_an_error_on_one_process_is_that_of_all(failing, meanwhile, tmp_path):
    assert LONGEST < LONG
    what = ["fail", meanwhile] if failing == 0 else [meanwhile, "fail"]
    found = run_two(",".join(what), tmp_path, silence=60)
    assert found == [["AlignmentError", f"process {failing} found something wrong"]] * 2


@pytest.mark.timeout(200)
@pytest.mark.parametrize("what", ["wait,killed", "work,killed", "killed,wait", "killed,work", "wait,frozen"])
def test_a_process_that_is_gone_ends_the_others(what, tmp_path):
    found = run_two(what, tmp_path, silence=4)
    gone = next(rank for rank, each in enumerate(what.split(",")) if each in ("killed", "frozen"))
    assert found[gone] is None
    kind, message = found[1 - gone]
    assert kind == "ProcessError"
    assert message.startswith((f"process {gone} of 2 ended or cannot be reached", "another process ended"))
