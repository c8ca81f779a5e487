"""Killed at any point and run again, a command gives what it gives undisturbed, byte for byte, and nothing else."""

import os

import pytest

from tests.faults.harness import KILLED, assert_same, draws, forked, killed, working_in

A_FEW = 6
MANY = int(os.environ.get("HF_LLFC_KILLS", "60"))


def check_kills(name, count, tmp_path, commands, undisturbed):
    expected, points = undisturbed(name)
    assert len(list(expected.glob("*.safetensors"))) > 3, "several shards"
    kills = 0
    for place, (at, before) in enumerate(draws(len(name), points, count)):
        with working_in(tmp_path / str(place)):
            code = killed(commands[name], tmp_path / "log", at, before)
            is_of_copy = code == 2 and "a worker process of this run ended" in (tmp_path / "log").read_text()
            assert code in (KILLED, 0) or is_of_copy, (tmp_path / "log").read_text()
            kills += code != 0
            if code:
                code = forked(commands[name], tmp_path / "log")
                message = (tmp_path / "log").read_text()
                # Stopped when all was done, it is an earlier output like any other.
                assert code == 0 or "the output folder is not empty" in message, (at, before, message)
        assert os.listdir(tmp_path / str(place)) == ["out"], (at, before)
        assert_same(tmp_path / str(place) / "out", expected)
    assert kills > count // 2


@pytest.mark.parametrize("name", ["merge", "copies", "align", "run"])
def test_a_few_kills(name, tmp_path, commands, undisturbed):
    check_kills(name, A_FEW, tmp_path, commands, undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["merge", "copies", "align", "run"])
def test_many_kills(name, tmp_path, commands, undisturbed):
    check_kills(name, MANY, tmp_path, commands, undisturbed)
