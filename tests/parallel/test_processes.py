"""Processes of a launcher: what they share, that all of them end when one does, and that no one else has a say."""

import base64
import json
import os
import pickle
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import psutil
import pytest
from torch.distributed import TCPStore

from hf_llfc.errors import AlignmentError
from hf_llfc.parallel.messages import SECRET_VARIABLE, pack, sign
from hf_llfc.parallel.processes import SILENCE_VARIABLE
from tests.parallel.processes_script import LONG

ROOT = Path(__file__).parents[2]
SCRIPT = Path(__file__).with_name("processes_script.py")

LONGEST = 100.0
"""Seconds for what ends in ten; much less than what a process does that is not told to stop."""


def environment(folder: Path, silence: float) -> dict[str, str]:
    """That of processes which keep their secret in a folder of the test."""
    return {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "HF_HOME": str(folder / "home"),
        "ACCELERATE_USE_CPU": "true",
        SILENCE_VARIABLE: str(silence),
    }


@contextmanager
def two(what: str, folder: Path, *, silence: float, secrets: tuple[str, str] = ("", "")):
    """Two processes that no launcher looks after, and the port of their store."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {
        **environment(folder, silence),
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    words = [sys.executable, str(SCRIPT), what, str(folder)]
    running = []
    for rank, secret in enumerate(secrets):
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank), SECRET_VARIABLE: secret}
        running.append(subprocess.Popen(words, env={**shared, **own}, stderr=subprocess.DEVNULL))
    try:
        yield running, port
    finally:
        for process in running:
            process.send_signal(signal.SIGKILL)
            process.wait()


def run_two(what: str, folder: Path, *, silence: float, secrets: tuple[str, str] = ("", "")) -> list[object]:
    """What two processes came to that no launcher looks after; None for one that wrote nothing."""
    with two(what, folder, silence=silence, secrets=secrets) as (running, _):
        for process, each in zip(running, what.split(","), strict=True):
            if each != "frozen":
                process.wait(LONGEST)
    return outcomes(folder)


def outcomes(folder: Path) -> list[object]:
    """What each process came to."""
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
        assert found["unpickled"] == []
    ours = ["AlignmentError", "-1 is negative"], ["AlignmentError", "-3 is negative"]
    divided = "integer division or modulo by zero"
    assert first["errors"] == [ours[0], ["ZeroDivisionError", divided], ours[1]]
    assert second["errors"] == [ours[0], ["RuntimeError", f"ZeroDivisionError: {divided}"], ours[1]]


@pytest.mark.timeout(200)
@pytest.mark.parametrize("what", ["long,fail", "fail,long", "long,killed"])
def test_a_launcher_ends_long_work_when_another_process_has_ended(what, tmp_path):
    assert LONGEST < LONG
    words = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", SCRIPT, what, tmp_path]
    run = subprocess.run(
        [sys.executable, *map(str, words)],
        env=environment(tmp_path, 60),
        capture_output=True,
        text=True,
        timeout=LONGEST,
    )
    assert run.returncode != 0
    failing = what.split(",").index("fail") if "fail" in what else None
    if failing is not None:
        assert outcomes(tmp_path)[failing] == ["AlignmentError", f"process {failing} found something wrong"]


@pytest.mark.timeout(200)
@pytest.mark.parametrize("meanwhile", ["wait", "work"])
@pytest.mark.parametrize("failing", [0, 1])
def test_an_error_on_one_process_is_that_of_all(failing, meanwhile, tmp_path):
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


class Exploit:
    """Makes a file when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self):
        return os.system, (f"touch {self.file}",)


@pytest.mark.timeout(200)
def test_what_a_stranger_writes_is_never_run(tmp_path):
    """It reads every key of the store, and writes pickles and unsigned failures where the run looks for its own."""
    proof = tmp_path / "executed"
    pickled = pickle.dumps(Exploit(proof))
    failure = pack(AlignmentError("from a stranger"))
    written = [
        pickled,
        pickled.hex(),
        base64.b64encode(pickled),
        (bytes(32) + pickled).hex(),
        (sign(b"a guess", "failure of 0", failure) + failure.numpy().tobytes()).hex(),
        "é" * 40,
        "",
    ]
    with two("attacked,attacked", tmp_path, silence=60) as (running, port):
        wait_for(tmp_path / "0.ready", tmp_path / "1.ready")
        store = TCPStore("127.0.0.1", port, None, False, timedelta(seconds=30))
        runs = {key.split("hf_llfc/")[1].split("/")[0] for key in store.list_keys() if "hf_llfc/" in key}
        assert len(runs) == 1
        prefix = f"hf_llfc/{runs.pop()}"
        assert store.check([f"{prefix}/beat/0"])
        for value in written:
            store.set("failure", value)
            for rank in range(2):
                store.set(f"{prefix}/failure/{rank}", value)
            store.add(f"{prefix}/failures", 1)
            time.sleep(0.1)  # the other process looks every few milliseconds
        for process in running:
            for address in listening(process.pid):
                with socket.create_connection(("127.0.0.1", address.port)) as stranger:
                    stranger.sendall(pickled)
        (tmp_path / "attacked").touch()
        for process in running:
            process.wait(LONGEST)
    assert outcomes(tmp_path) == [{"gather": [["from", 0], ["from", 1]], "unpickled": []}] * 2
    assert not proof.exists()
    pickle.loads(pickled)
    assert proof.exists()  # it would have run


@pytest.mark.timeout(200)
def test_processes_of_one_machine_listen_to_it_alone(tmp_path):
    with two("attacked,attacked", tmp_path, silence=60) as (running, port):
        wait_for(tmp_path / "0.ready", tmp_path / "1.ready")
        heard = [listening(process.pid) for process in running]
        (tmp_path / "attacked").touch()
        for process in running:
            process.wait(LONGEST)
    assert all(heard)
    # Torch opens the store at which the processes find each other, for a launcher or in its place.
    ours = {address.ip for of_process in heard for address in of_process if address.port != port}
    assert ours <= {"127.0.0.1", "::1"} and ours


@pytest.mark.timeout(200)
def test_processes_with_different_secrets_do_not_work_together(tmp_path):
    found = run_two("share,share", tmp_path, silence=20, secrets=("of one", "of another"))
    for rank, (kind, message) in enumerate(found):
        assert kind == "ProcessError"
        assert message.startswith(f"process {1 - rank} of 2 does not know the secret") and SECRET_VARIABLE in message


def wait_for(*files: Path) -> None:
    deadline = time.monotonic() + LONGEST
    while not all(file.exists() for file in files):
        assert time.monotonic() < deadline, f"{files} did not come"
        time.sleep(0.02)


def listening(pid: int) -> list:
    """Addresses at which a process waits for connections."""
    found = psutil.Process(pid).net_connections(kind="inet")
    return [each.laddr for each in found if each.status == psutil.CONN_LISTEN]
