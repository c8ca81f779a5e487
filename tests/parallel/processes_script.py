"""Run as one of the processes of a launcher: does what it is told and writes what came of it.

RANK=0 WORLD_SIZE=2 MASTER_ADDR=… MASTER_PORT=… python processes_script.py WHAT FOLDER
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

import torch

from hf_llfc.errors import AlignmentError
from hf_llfc.parallel.processes import Processes

LONG = 300.0

SHORT = 3.0

UNPICKLED: list[str] = []


def note_unpickled(event: str, arguments: tuple) -> None:
    """Notes every class or function that a pickle names."""
    if event == "pickle.find_class":
        UNPICKLED.append(".".join(map(str, arguments)))


def squared(number: int) -> int:
    """Work for a worker."""
    if number < 0:
        raise AlignmentError(f"{number} is negative")
    return number * number


def share(processes: Processes) -> dict:
    """Everything that processes do together when nothing goes wrong, and an error that all of them survive."""
    calls = []
    found = {
        "on_main": processes.on_main(lambda: [calls.append("on_main"), processes.rank][1]),
        "main_first": processes.main_first(lambda: [calls.append("main_first"), processes.rank][1]),
        "gather": processes.gather(("from", processes.rank)),
        "map": processes.workers().map(squared, list(range(7)), costs=[1, 1, 1, 1, 1, 1, 9]),
        "errors": [],
    }
    processes.barrier()
    for work in (
        lambda: processes.on_main(lambda: squared(-1)),
        lambda: processes.on_main(lambda: 1 // 0),
        lambda: processes.workers().map(squared, [1, 2, -3]),
    ):
        try:
            work()
        except Exception as error:
            found["errors"].append([type(error).__name__, str(error)])
    return {**found, "calls": calls, "unpickled": UNPICKLED}


def wait(processes: Processes) -> None:
    """Waits for the others in a meeting."""
    processes.gather(None)
    processes.gather(None)


def work_for(seconds: float):
    """Is busy elsewhere before it meets the others again."""

    def work(processes: Processes) -> None:
        processes.gather(None)
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            torch.ones(64, 64) @ torch.ones(64, 64)
        processes.gather(None)

    return work


def be_attacked(processes: Processes) -> dict:
    """Waits for the other, which waits until someone has tried to break in."""
    processes.gather(None)
    folder = Path(sys.argv[2])
    (folder / f"{processes.rank}.ready").touch()
    while processes.is_main and not (folder / "attacked").exists():
        time.sleep(0.01)
    return {"gather": processes.gather(("from", processes.rank)), "unpickled": UNPICKLED}


def fail(processes: Processes) -> None:
    """Ends with an error, between two meetings."""
    processes.gather(None)
    raise AlignmentError(f"process {processes.rank} found something wrong")


def end_by(number: int):
    """Is ended by a signal, between two meetings."""

    def end(processes: Processes) -> None:
        processes.gather(None)
        os.kill(os.getpid(), number)
        time.sleep(LONG)

    return end


WHAT = {
    "share": share,
    "wait": wait,
    "work": work_for(SHORT),
    "long": work_for(LONG),
    "attacked": be_attacked,
    "fail": fail,
    "killed": end_by(signal.SIGKILL),
    "frozen": end_by(signal.SIGSTOP),
}


def main() -> None:
    """What each process does is told as WHAT,WHAT."""
    torch.set_num_threads(1)
    what, folder = sys.argv[1].split(","), Path(sys.argv[2])
    rank, code = int(os.environ["RANK"]), 0
    try:
        started = Processes()
        sys.addaudithook(note_unpickled)
        with started as processes:
            found = WHAT[what[rank]](processes)
    except Exception as error:
        found, code = [type(error).__name__, str(error)], 1
    (folder / f"{rank}.json").write_text(json.dumps(found))
    sys.exit(code)


if __name__ == "__main__":
    main()
