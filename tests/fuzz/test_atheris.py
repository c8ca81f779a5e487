"""The targets under guided fuzzing, a while each; see atheris_harness."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fuzz import targets
from tests.fuzz.test_fuzz import VALID

ROOT = Path(__file__).parents[2]
SECONDS = int(os.environ.get("HF_LLFC_FUZZ_SECONDS", "60"))


@pytest.mark.fuzz
@pytest.mark.timeout(SECONDS + 120)
@pytest.mark.parametrize("name", [*targets.BYTES, *targets.TEXTS])
def test_guided(name, tmp_path):
    pytest.importorskip("atheris", reason="needs the extra `fuzz`")
    if name in VALID:
        (tmp_path / "valid").write_bytes(VALID[name]())
    words = [sys.executable, "-m", "tests.fuzz.atheris_harness", name, str(tmp_path), f"-max_total_time={SECONDS}"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    found = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert found.returncode == 0, found.stdout[-4000:] + found.stderr[-4000:]
