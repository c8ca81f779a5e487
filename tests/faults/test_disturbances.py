"""Interrupts, full disks, failing reads and parents that change: one clear error, and run again the right result."""

import errno
import os
import shutil
import signal
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path

import pytest
import yaml

from hf_llfc.parallel.processes import SILENCE_VARIABLE
from tests.faults.harness import Points, assert_same, counted, disturbed, draws, forked, working_in

ROOT = Path(__file__).parents[2]
READS = ("preadv",)


def told(log: Path) -> str:
    """The one error that a run ended with."""
    errors = [line for line in log.read_text().splitlines() if line.startswith("hf-llfc: error: ")]
    assert len(errors) == 1, log.read_text()
    assert "Traceback" not in log.read_text()
    return errors[0]


def left() -> list[str]:
    return sorted(os.listdir())


# -- interrupts


@pytest.mark.parametrize("name", ["merge", "align"])
def test_an_interrupt_from_the_keyboard_ends_the_run_and_is_taken_up(name, tmp_path, commands, undisturbed):
    expected, points = undisturbed(name)
    for place, (at, before) in enumerate(draws(place_seed(name), points, 4)):
        with working_in(tmp_path / str(place)):
            interrupt = Points(at, lambda: os.kill(os.getpid(), signal.SIGINT), before)
            code = disturbed(commands[name], tmp_path / "log", interrupt)
            assert code in (130, 0), (at, before, (tmp_path / "log").read_text())
            if code == 130:
                assert "hf-llfc: interrupted" in (tmp_path / "log").read_text()
                assert left() in ([], [".out.partial"], [".out.partial", "out"])
                assert forked(commands[name], tmp_path / "log") == 0, (at, before, (tmp_path / "log").read_text())
            assert left() == ["out"]
            assert_same(Path("out"), expected)


def test_an_interrupt_during_a_progress_bar_gives_the_terminal_back(tmp_path, commands, undisturbed):
    screen, terminal = os.openpty()
    shown: list[bytes] = []

    def watch() -> None:
        with suppress(OSError):  # nobody writes any more
            while content := os.read(screen, 4096):
                shown.append(content)

    def run() -> int:
        os.dup2(terminal, 2)
        sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115 - the terminal
        return commands["merge"]()

    watcher = threading.Thread(target=watch)
    with working_in(tmp_path):
        interrupt = Points(2, lambda: os.kill(os.getpid(), signal.SIGINT), calls=("pwrite",))
        watcher.start()
        code = disturbed(run, tmp_path / "log", interrupt)
        os.close(terminal)
        watcher.join()
        os.close(screen)
        text = b"".join(shown).decode()
        assert code == 130 and "hf-llfc: interrupted" in text, text + (tmp_path / "log").read_text()
        assert "matching" in text and text.count("\x1b[?25h") >= text.count("\x1b[?25l") > 0, "the cursor is there"
        assert "Traceback" not in text
        assert forked(commands["merge"], tmp_path / "log") == 0
        assert_same(Path("out"), undisturbed("merge")[0])


def place_seed(name: str) -> int:
    return sum(map(ord, name))


# -- what belongs to another run


def test_another_recipe_a_changed_parent_and_a_second_run_are_refused(bench, commands, undisturbed, tmp_path):
    expected, points = undisturbed("merge")
    with working_in(tmp_path):
        stop = Points(int(points * 0.8), lambda: os.kill(os.getpid(), signal.SIGKILL))
        assert disturbed(commands["merge"], tmp_path / "log", stop) == -signal.SIGKILL
        assert left() == [".out.partial", "log"]
        assert forked(lambda: commands["merge"]("dtype=float16"), tmp_path / "log") == 2
        assert "interrupted run of something else (recipe.dtype was absent and is 'float16')" in told(tmp_path / "log")
        weights = bench / "b" / "model.safetensors"
        before = weights.stat()
        os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
        try:
            assert forked(commands["merge"], tmp_path / "log") == 2
        finally:
            os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns))
        assert "inputs.1.files.model.safetensors.mtime_ns was" in told(tmp_path / "log")

        words = [sys.executable, "-m", "hf_llfc", "run", str(bench / "merge.yaml")]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}

        def second() -> None:
            with (tmp_path / "second").open("w") as log:
                subprocess.run(words, stderr=log, env=environment, timeout=100)

        assert disturbed(commands["merge"], tmp_path / "log", Points(1, second, calls=("pwrite",))) == 0
        assert "another run is writing this output" in told(tmp_path / "second")
        assert_same(Path("out"), expected)
        shutil.rmtree("out")
        assert disturbed(commands["merge"], tmp_path / "log", stop) == -signal.SIGKILL
        assert forked(lambda: commands["merge"]("dtype=float16", "--restart"), tmp_path / "log") == 0
        assert left() == ["log", "out", "second"]


# -- disks


@pytest.fixture
def small_disk(tmp_path):
    """A disk of half a megabyte, and what makes it larger."""
    disk = tmp_path / "disk"
    disk.mkdir()

    def mount(options: str) -> bool:
        words = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(disk)]
        return shutil.which("mount") is not None and subprocess.run(words, capture_output=True).returncode == 0

    if not mount("size=96k"):
        pytest.skip("a disk can be mounted by the super-user only")
    yield disk, lambda: mount("remount,size=64m")
    subprocess.run(["umount", str(disk)], check=True)


def unchecked(run):
    """The same run, on a disk that only fills up while it works."""

    def work() -> int:
        import hf_llfc.pipeline.flow
        import hf_llfc.pipeline.single_stages

        for module in (hf_llfc.pipeline.single_stages, hf_llfc.pipeline.flow):
            module.refuse_without_room = lambda output, infos, copies=0: None
        shutil.disk_usage = lambda path: shutil._ntuple_diskusage(10**12, 0, 10**12)
        return run()

    return work


@pytest.mark.parametrize("name", ["merge", "align"])
def test_a_disk_that_fills_up_is_one_error_and_with_room_the_run_goes_on(
    name, tmp_path, small_disk, commands, undisturbed
):
    disk, enlarge = small_disk
    with working_in(disk):
        assert forked(commands[name], tmp_path / "log") == 2
        assert "are free there; make room" in told(tmp_path / "log")
        assert left() == []
        assert forked(unchecked(commands[name]), tmp_path / "log") == 2
        assert "No space left on device" in told(tmp_path / "log")
        assert left() in ([], [".out.partial"])
        assert enlarge()
        assert forked(commands[name], tmp_path / "log") == 0, (tmp_path / "log").read_text()
        assert left() == ["out"]
        assert_same(Path("out"), undisturbed(name)[0])


def test_a_disk_without_room_for_a_report_is_refused_before_the_diagnosis(tmp_path, small_disk, commands):
    disk, enlarge = small_disk
    with working_in(disk):
        assert forked(commands["diagnose"], tmp_path / "log") == 2
        assert "are free there; make room" in told(tmp_path / "log")
        assert left() == []
        assert forked(unchecked(commands["diagnose"]), tmp_path / "log") == 2
        assert "the output cannot be written (No space left on device); make room" in told(tmp_path / "log")
        assert left() == []
        assert enlarge()
        assert forked(commands["diagnose"], tmp_path / "log") == 0, (tmp_path / "log").read_text()
        assert left() == ["out"]


def test_a_disk_with_room_for_the_weights_alone_is_one_error(tmp_path, small_disk, commands, undisturbed):
    disk, enlarge = small_disk
    expected, _ = undisturbed("run")
    weights = sum(path.stat().st_size for path in expected.glob("*.safetensors"))
    words = ["mount", "-o", f"remount,size={weights // 1024 + 64}k", str(disk)]
    subprocess.run(words, check=True)
    with working_in(disk):
        assert forked(unchecked(commands["run"]), tmp_path / "log") == 2
        assert "No space left on device); make room there and run again" in told(tmp_path / "log")
        assert left() == [".out.partial"]
        assert enlarge()
        assert forked(commands["run"], tmp_path / "log") == 0, (tmp_path / "log").read_text()
        assert left() == ["out"]
        assert_same(Path("out"), expected)


# -- reads


def failing(message: int):
    def fail() -> None:
        raise OSError(message, os.strerror(message))

    return fail


def test_a_read_that_fails_is_one_error_and_the_same_run_succeeds_later(tmp_path, commands, undisturbed):
    expected, _ = undisturbed("merge")
    _, reads = count_reads(tmp_path, commands)
    for place, (at, _) in enumerate(draws(3, reads, 4)):
        with working_in(tmp_path / str(place)):
            assert disturbed(commands["merge"], tmp_path / "log", Points(at, failing(errno.EIO), calls=READS)) == 2
            message = told(tmp_path / "log")
            assert "model.safetensors: tensor " in message and "cannot be read (Input/output error)" in message
            assert left() in ([], [".out.partial"])
            assert forked(commands["merge"], tmp_path / "log") == 0
            assert left() == ["out"]
            assert_same(Path("out"), expected)


def count_reads(tmp_path, commands):
    with working_in(tmp_path / "counting"):
        return counted(commands["merge"], tmp_path / "log", READS)


def test_reads_that_give_less_than_was_asked_for_change_nothing(tmp_path, commands, undisturbed):
    def run() -> int:
        read = os.preadv
        os.preadv = lambda descriptor, rooms, place: read(descriptor, [rooms[0][:777]], place)
        return commands["merge"]()

    with working_in(tmp_path / "short"):
        assert forked(run, tmp_path / "log") == 0
        assert_same(Path("out"), undisturbed("merge")[0])


# -- parents


@pytest.fixture
def own_parents(bench, commands, tmp_path):
    """A merge of copies of the models, which may be damaged; and the weights of the second one."""
    for name in "ab":
        shutil.copytree(bench / name, tmp_path / name)
    recipe = yaml.safe_load((bench / "merge.yaml").read_text())
    for entry, name in zip(recipe["models"], "ab", strict=True):
        entry["model"] = str(tmp_path / name)
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(recipe))

    def merge() -> int:
        from hf_llfc.cli import main

        return main(["run", str(tmp_path / "own.yaml")])

    return merge, tmp_path / "b" / "model.safetensors"


def overwritten(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(-100, os.SEEK_END)
        file.write(b"\0" * 100)


def replaced(path: Path) -> None:
    shutil.copy(path, path.with_suffix(".new"))
    path.with_suffix(".new").replace(path)


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


@pytest.mark.parametrize("change", [overwritten, replaced, cut, Path.unlink])
def test_a_parent_that_changes_while_it_is_read_is_one_error(change, tmp_path, own_parents):
    merge, weights = own_parents
    with working_in(tmp_path / "counting"):
        code, reads = counted(merge, tmp_path / "log", READS)
        assert code == 0
    original = weights.read_bytes()
    for place, (at, before) in enumerate(draws(7, reads, 3)):
        with working_in(tmp_path / str(place)):
            points = Points(at, lambda: change(weights), before, calls=READS)
            assert disturbed(merge, tmp_path / "log", points) == 2, (at, reads)
            message = told(tmp_path / "log")
            assert f"{weights}: " in message
            assert "the file has changed since it was opened" in message or "cut off while it was read" in message
            assert left() == []
            weights.write_bytes(original)
            assert forked(merge, tmp_path / "log") == 0
            assert left() == ["out"]


# -- processes


@pytest.mark.timeout(240)
def test_a_process_that_is_killed_ends_the_other_and_the_run_is_taken_up(bench, tmp_path, commands, undisturbed):
    expected, _ = undisturbed("merge")
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "ACCELERATE_USE_CPU": "true",
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "29577",
        SILENCE_VARIABLE: "8",
    }
    words = [sys.executable, str(Path(__file__).with_name("killed_rank.py")), str(bench / "merge.yaml")]
    tmp_path.joinpath("work").mkdir()
    running = [
        subprocess.Popen(
            words,
            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            cwd=tmp_path / "work",
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        _, message = running[0].communicate(timeout=120)
        assert running[1].wait(timeout=60) == -signal.SIGKILL
    finally:
        for process in running:
            process.kill()
    assert running[0].returncode == 2, message
    assert message.count("hf-llfc: error: ") == 1 and "run the same again" in message
    with working_in(tmp_path / "work"):
        assert left() in ([], [".out.partial"])
        assert forked(commands["merge"], tmp_path / "log") == 0
        assert left() == ["out"]
        assert_same(Path("out"), expected)
