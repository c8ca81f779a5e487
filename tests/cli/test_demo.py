"""`hf-llfc demo`, with the first architecture, few epochs and merges: it says what it does, and goes on if stopped."""

import hashlib
import json
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from hf_llfc.cli import demo
from hf_llfc.errors import CheckpointError

SHORT = """
import sys
from dataclasses import replace
from hf_llfc.cli import _quiet_libraries, main
_quiet_libraries(verbose=False)  # before what is silenced is loaded
from hf_llfc.cli import demo
demo.ARCHITECTURES = (replace(demo.ARCHITECTURES[0], epochs=2),)
demo.METHODS = {"independent": ("none", "weight_matching"), "spawned": ("none",)}
sys.exit(main(sys.argv[1:]))
"""


pytestmark = pytest.mark.timeout(600)  # they train


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """What `SHORT` does, in this process."""
    monkeypatch.setattr(demo, "ARCHITECTURES", (replace(demo.ARCHITECTURES[0], epochs=2),))
    monkeypatch.setattr(demo, "METHODS", {"independent": ("none", "weight_matching"), "spawned": ("none",)})


def command(folder: Path, *words: str) -> list[str]:
    """The command line of a short demo."""
    return [sys.executable, "-c", SHORT, "demo", "--out", str(folder), *words]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A demo that nothing stopped."""
    folder = tmp_path_factory.mktemp("whole") / "demo"
    done = subprocess.run(command(folder, "--format", "json"), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == json.loads((folder / "demo.json").read_text())
    stages = [line.removeprefix("hf-llfc: ") for line in done.stderr.splitlines()]
    assert stages[0].startswith("loading") and stages[1] == "training resnet"
    assert [stage for stage in stages[2:] if " of " not in stage] == [
        "merging resnet-independent-none",
        "merging resnet-independent-weight_matching",
        "merging resnet-spawned-none",
    ]
    return folder


def weights(folder: Path) -> dict[str, str]:
    """The hashes of the weights of all models."""
    files = sorted(folder.rglob("model.safetensors"))
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def rows(folder: Path) -> list[dict]:
    return json.loads((folder / "demo.json").read_text())["rows"]


def test_a_stopped_demo_goes_on(whole, tmp_path, caplog):
    """What was finished is not made again, and the end is that of a demo that nothing stopped."""
    folder = tmp_path / "demo"

    def stop(description: str, done: int, total: int) -> None:
        if (folder / "parents" / "resnet-branch-a").exists() and done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        demo.run_demo(folder, progress=stop)
    assert "run the same again to go on" in caplog.text
    finished = {path: path.stat().st_mtime_ns for path in folder.rglob("model.safetensors")}
    assert len(finished) == 3
    demo.run_demo(folder)
    assert finished == {path: path.stat().st_mtime_ns for path in finished}
    assert weights(folder) == weights(whole) and rows(folder) == rows(whole)
    assert not (folder / demo.UNFINISHED).exists()


def test_a_demo_ended_by_a_signal_goes_on_with_the_same_command(whole, tmp_path):
    folder = tmp_path / "demo"
    words = command(folder, "--quiet")
    running = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while running.poll() is None and not (folder / "merged" / "resnet-independent-none").exists():
        time.sleep(0.05)
    running.send_signal(signal.SIGTERM)
    out, error = running.communicate(timeout=60)
    assert running.returncode == 128 + signal.SIGTERM and out == ""
    assert "stopped by a signal" in error and "run the same again to go on" in error
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0 and "goes on after an interrupted demo" in done.stderr
    assert weights(folder) == weights(whole) and rows(folder) == rows(whole)


def test_a_demo_stopped_before_anything_is_finished_leaves_nothing(tmp_path):
    def interrupt(description: str, done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        demo.run_demo(tmp_path / "demo", progress=interrupt)
    assert not list(tmp_path.iterdir())


def test_another_seed_does_not_go_on(tmp_path):
    folder = tmp_path / "demo"

    def stop(description: str, done: int, total: int) -> None:
        if (folder / "parents" / "resnet-a").exists():
            raise KeyboardInterrupt

    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            demo.run_demo(folder, progress=stop)
        assert [path.name for path in (folder / "parents").iterdir()] == ["resnet-a"]
    before = weights(folder)
    with pytest.raises(CheckpointError, match=r"an interrupted demo of another seed .* --overwrite replaces it"):
        demo.run_demo(folder, seed=1, progress=stop)
    assert weights(folder) == before
    with pytest.raises(KeyboardInterrupt):
        demo.run_demo(folder, seed=1, overwrite=True, progress=stop)
    assert weights(folder) != before


def test_a_folder_of_other_things_is_left_alone(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="choose another with --out"):
        demo.run_demo(tmp_path, overwrite=True)
    assert (tmp_path / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("notes.txt", "would delete them: notes.txt"),
        ("data/mine.parquet", "would delete them: data/mine.parquet"),
        ("parents/resnet-a/optimizer.pt", "would delete them: parents/resnet-a/optimizer.pt"),
        ("merged/mine/config.json", "would delete them: merged/mine/config.json"),
        ("merged/resnet-spawned-none/notes.txt", "would delete them: notes.txt"),
        ("recipes/resnet-spawned-none.yaml", "would be lost: recipes/resnet-spawned-none.yaml"),
        ("parents/resnet-a/model.safetensors", "would be lost: parents/resnet-a/model.safetensors"),
        ("merged/resnet-spawned-none/README.md", "would be lost: README.md"),
    ],
)
def test_overwriting_a_demo_never_loses_what_is_not_a_demo_s(whole, tmp_path, name, said):
    folder = tmp_path / "demo"
    shutil.copytree(whole, folder)

    def begin(description: str, done: int, total: int) -> None:
        raise KeyboardInterrupt

    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text("mine")
    before = {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
    with pytest.raises(CheckpointError) as caught:
        demo.run_demo(folder, overwrite=True, progress=begin)
    assert said in str(caught.value) and str(caught.value).startswith(str(folder))
    assert before == {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
    (folder / name).unlink()
    with pytest.raises(KeyboardInterrupt):
        demo.run_demo(folder, overwrite=True, progress=begin)
    assert not folder.exists(), "replaced"
