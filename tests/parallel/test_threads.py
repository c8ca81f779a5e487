"""Tiny work computes with one thread, unless the user says otherwise; what it computes is the same."""

import json
import os
import subprocess
import sys

import pytest

from hf_llfc.parallel.threads import SMALL_BYTES, is_chosen, one_thread, one_thread_if_small, wait_asleep

THREADS = f"""
import json, sys, torch
from hf_llfc.parallel.threads import one_thread_if_small
if len(sys.argv) > 1:
    torch.set_num_threads(int(sys.argv[1]))
found = []
for nbytes in ({SMALL_BYTES} - 1, {SMALL_BYTES}):
    function = one_thread_if_small(lambda nbytes: nbytes)(lambda nbytes: torch.get_num_threads())
    found.append([function(nbytes), torch.get_num_threads()])
print(json.dumps(found))
"""


def threads(*words: str, **environment: str) -> list[list[int]]:
    """Threads inside and after a function that is given a small model and one that is not, in a process of its own."""
    kept = {name: value for name, value in os.environ.items() if name not in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    done = subprocess.run(
        [sys.executable, "-c", THREADS, *words],
        env={**kept, "PYTHONPATH": os.getcwd(), **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_small_models_compute_with_one_thread_and_large_ones_with_all():
    small, large = threads()
    assert small[0] == 1 and small[1] == large[0] == large[1] >= 1


def test_what_the_user_chose_stays():
    small, large = threads(OMP_NUM_THREADS="2")  # as many as there are cores at most
    assert small == large and small[0] == small[1] == min(2, large[0])
    many = str((os.cpu_count() or 1) + 5)
    assert threads(many) == [[int(many)] * 2] * 2


def test_a_choice_is_told_from_what_torch_takes_by_itself():
    cores = os.cpu_count() or 1
    assert not is_chosen(cores, {}) and is_chosen(cores, {"OMP_NUM_THREADS": "2"}) and is_chosen(cores + 5, {})


def test_threads_come_back_after_an_error():
    import torch

    before = torch.get_num_threads()
    with pytest.raises(KeyError), one_thread():
        raise KeyError
    assert torch.get_num_threads() == before

    @one_thread_if_small(lambda: 0)
    def fail() -> None:
        raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert torch.get_num_threads() == before


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, {"OMP_WAIT_POLICY": "PASSIVE"}),
        ({"OMP_WAIT_POLICY": "ACTIVE"}, {"OMP_WAIT_POLICY": "ACTIVE"}),
        ({"GOMP_SPINCOUNT": "7"}, {"GOMP_SPINCOUNT": "7"}),
    ],
    ids=str,
)
def test_threads_wait_asleep_unless_the_environment_says_how(environment, expected):
    wait_asleep(environment)
    assert environment == expected


def test_the_command_line_decides_how_threads_wait_before_torch_loads(tmp_path):
    code = """
import os, sys
from hf_llfc.cli import main
assert "torch" not in sys.modules
class Seen:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            print(os.environ.get("OMP_WAIT_POLICY"))
            sys.meta_path.remove(self)
sys.meta_path.insert(0, Seen())
main(["inspect", sys.argv[1]])
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True)
    assert done.stdout == "PASSIVE\n", done.stderr
