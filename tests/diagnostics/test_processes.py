import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.diagnostics.over_processes import diagnose

SCRIPT = Path(__file__).with_name("over_processes.py")
ROOT = Path(__file__).parents[2]


def flatten(value, path=""):
    """Every number and text of nested JSON values, by its place."""
    if isinstance(value, dict):
        return {where: leaf for key, item in value.items() for where, leaf in flatten(item, f"{path}.{key}").items()}
    if isinstance(value, list):
        return {
            where: leaf for index, item in enumerate(value) for where, leaf in flatten(item, f"{path}.{index}").items()
        }
    return {path: value}


@pytest.mark.timeout(300)
def test_two_processes_give_the_numbers_of_one(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*launcher, str(SCRIPT), str(tmp_path)], env=environment, cwd=ROOT, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stderr[-4000:]
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert first == second
    assert first["processes"] == 2
    # The sample belongs to the second process; the first learns of it instead of waiting forever.
    assert "is empty: its attention mask is zero everywhere" in first["error"]

    alone = flatten(json.loads(json.dumps(diagnose(None))))
    together = flatten({name: first[name] for name in ("report", "suggestion", "scores")})
    assert list(together) == list(alone)
    for place, value in alone.items():
        expected = pytest.approx(value, abs=1e-6) if isinstance(value, float) else value
        assert together[place] == expected, place
