"""The output folder: complete or not there at all, and nobody else's files are touched."""

import ast
import errno
import os
import shutil
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from hf_llfc.checkpoints import OutputFolder
from hf_llfc.checkpoints.writing.listing import list_files, read_listing
from hf_llfc.checkpoints.writing.output import WEIGHTS_STAGE
from hf_llfc.checkpoints.writing.shards import Shard
from hf_llfc.errors import CheckpointError, StorageError


def fill(folder, text="new"):
    (folder / "config.json").write_text(text)
    (folder / "llfc").mkdir()


def earlier(target):
    """An output that a run wrote before."""
    with OutputFolder(target) as folder:
        fill(folder, "old")


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def refused(path, expected, **options):
    before = sorted(os.listdir(path.parent)) if path.parent.is_dir() else None
    with pytest.raises(CheckpointError) as caught, OutputFolder(path, **options):
        pytest.fail("work began")
    assert str(caught.value).startswith(f"{path}: ") and expected in str(caught.value)
    with pytest.raises(CheckpointError):
        OutputFolder(path, **options).check()
    assert before is None or sorted(os.listdir(path.parent)) == before


def test_the_folder_appears_at_the_end(tmp_path):
    target = tmp_path / "out"
    with OutputFolder(str(target)) as folder:
        fill(folder)
        assert not target.exists() and folder.parent == tmp_path / ".out.partial"
    assert names(target) == ["config.json", "llfc"] and names(tmp_path) == ["out"]


def test_the_folder_has_the_permissions_of_any_new_folder(tmp_path):
    (tmp_path / "plain").mkdir()
    with OutputFolder(tmp_path / "out"):
        pass
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == stat.S_IMODE((tmp_path / "plain").stat().st_mode)


def test_missing_parents_are_made_and_on_failure_removed(tmp_path):
    with OutputFolder(tmp_path / "x" / "y" / "out") as folder:
        fill(folder)
    assert names(tmp_path / "x" / "y" / "out") == ["config.json", "llfc"]
    with pytest.raises(KeyError), OutputFolder(tmp_path / "p" / "q" / "out"):
        raise KeyError
    assert names(tmp_path) == ["x"]


def test_an_empty_folder_is_taken(tmp_path):
    (tmp_path / "out").mkdir()
    with OutputFolder(tmp_path / "out") as folder:
        fill(folder)
    assert names(tmp_path / "out") == ["config.json", "llfc"] and names(tmp_path) == ["out"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("existing", [None, "empty", "checkpoint"])
def test_on_failure_everything_is_as_it_was(tmp_path, error, existing):
    target = tmp_path / "out"
    if existing == "empty":
        target.mkdir()
    if existing == "checkpoint":
        earlier(target)
    before = names(tmp_path)
    with pytest.raises(error), OutputFolder(target, overwrite=True) as folder:
        fill(folder)
        raise error
    assert names(tmp_path) == before
    if existing == "checkpoint":
        assert (target / "config.json").read_text() == "old"


def test_a_folder_that_is_not_empty_is_refused(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    refused(tmp_path / "out", "not empty (it holds notes.txt)")


def test_overwriting_replaces_an_earlier_checkpoint_as_a_whole(tmp_path):
    with OutputFolder(tmp_path / "out") as folder:
        fill(folder, "old")
        (folder / "model-00009-of-00009.safetensors").touch()
    refused(tmp_path / "out", "not empty")
    with OutputFolder(tmp_path / "out", overwrite=True) as folder:
        fill(folder)
        assert (tmp_path / "out" / "config.json").read_text() == "old"
    assert names(tmp_path / "out") == ["config.json", "llfc"] and names(tmp_path) == ["out"]
    assert (tmp_path / "out" / "config.json").read_text() == "new"


@pytest.mark.parametrize("listed", [None, "", "[]", '{"format": "other"}', '{"format": "hf_llfc.files/1"}'])
def test_overwriting_never_removes_what_no_run_wrote(tmp_path, listed):
    folder = tmp_path / "trained"
    folder.mkdir()
    fill(folder, "a checkpoint of somebody else")
    if listed is not None:
        (folder / "llfc" / "files.json").write_text(listed)
    refused(folder, "was not written by hf-llfc, so it is not overwritten (it holds config.json", overwrite=True)


@pytest.mark.parametrize("stranger", ["notes.txt", "llfc/mine.yaml", "checkpoint-500/config.json", "data/train.jsonl"])
def test_overwriting_never_removes_files_beside_those_of_a_run(tmp_path, stranger):
    target = tmp_path / "out"
    earlier(target)
    for name in ("README.md", "llfc/path.png"):  # a card that was written later
        (target / name).touch()
    (target / stranger).parent.mkdir(exist_ok=True)
    (target / stranger).touch()
    refused(target, f"overwriting would delete them: {stranger}; move them elsewhere", overwrite=True)
    (target / stranger).unlink()
    with OutputFolder(target, overwrite=True) as folder:
        fill(folder)
    assert (target / "config.json").read_text() == "new"


@pytest.mark.parametrize("name", ["README.md", "config.json", "llfc/recipe.yaml", "model.safetensors", "tokenizer/x"])
@pytest.mark.parametrize("same_size", [True, False])
def test_overwriting_never_loses_what_a_user_changed(tmp_path, name, same_size):
    target = tmp_path / "out"
    with OutputFolder(target) as folder:
        for each in ("README.md", "config.json", "llfc/recipe.yaml", "tokenizer/x"):
            (folder / each).parent.mkdir(exist_ok=True)
            (folder / each).write_text("written by a run")
        save_file({"a": torch.zeros(8), "b": torch.zeros(3, dtype=torch.int8)}, folder / "model.safetensors")
    written = (target / name).read_bytes()
    own = written[:-1] + b"!" if same_size else written + b", and by me"
    time.sleep(0.02)  # beyond the clock of the file system
    (target / name).write_bytes(own)
    expected = f"were changed since hf-llfc wrote them, and the changes would be lost: {name}; move them elsewhere"
    refused(target, expected, overwrite=True)
    assert (target / name).read_bytes() == own
    (target / name).write_bytes(written)  # as it was, at another time
    OutputFolder(target, overwrite=True).check()
    (target / name).unlink()
    with OutputFolder(target, overwrite=True) as folder:
        fill(folder)
    assert (target / "config.json").read_text() == "new"


def test_a_copy_of_an_output_is_an_output(tmp_path):
    with OutputFolder(tmp_path / "out") as folder:
        fill(folder)
        save_file({"a": torch.zeros(8)}, folder / "model.safetensors")
    shutil.copytree(tmp_path / "out", tmp_path / "copy", copy_function=shutil.copyfile)
    OutputFolder(tmp_path / "copy", overwrite=True).check()
    (tmp_path / "copy" / "config.json").write_text("abc")
    refused(tmp_path / "copy", "would be lost: config.json", overwrite=True)


def test_weights_are_not_read_again_to_be_listed(tmp_path):
    with OutputFolder(tmp_path / "out") as folder:
        fill(folder)
        save_file({"b": torch.ones(700_000), "a": torch.zeros(8)}, folder / "model.safetensors")
        digest = Shard.of_file(folder / "model.safetensors").checksum(folder / "model.safetensors")
    listing = read_listing(tmp_path / "out")
    assert listing is not None and listing.states["model.safetensors"]["size"] > 2_800_000
    list_files(tmp_path / "out", {"model.safetensors": digest})
    listing = read_listing(tmp_path / "out")
    assert listing.states["model.safetensors"]["pieces"] == digest
    os.utime(tmp_path / "out" / "model.safetensors")
    assert not list(listing.edited(tmp_path / "out")) and not list(listing.strangers(tmp_path / "out"))


def test_files_that_appear_in_an_earlier_output_meanwhile_are_kept(tmp_path):
    earlier(tmp_path / "out")
    with (
        pytest.raises(CheckpointError, match=r"would delete them: notes\.txt"),
        OutputFolder(tmp_path / "out", overwrite=True) as folder,
    ):
        fill(folder)
        (tmp_path / "out" / "notes.txt").touch()
    assert names(tmp_path / "out") == ["config.json", "llfc", "notes.txt"]
    assert (tmp_path / ".out.partial" / "output" / "config.json").read_text() == "new"


def test_a_target_that_cannot_be_moved_away_is_refused_before_the_work(tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    rename = Path.rename

    def busy(self, to):
        if self == tmp_path / "out":
            raise OSError(errno.EBUSY, "Device or resource busy")
        return rename(self, to)

    monkeypatch.setattr(Path, "rename", busy)
    with pytest.raises(CheckpointError, match=r"cannot be replaced .*busy"), OutputFolder(tmp_path / "out"):
        pytest.fail("work began")
    assert names(tmp_path) == ["out"]


@pytest.mark.skipif(not os.path.ismount("/proc"), reason="needs a mount point")
def test_a_mount_point_is_refused():
    with pytest.raises(CheckpointError, match=r"^/proc: the output folder is a mount point"):
        OutputFolder("/proc").check()


def test_overwriting_never_removes_the_current_folder(tmp_path, monkeypatch):
    fill(tmp_path)
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    refused(tmp_path / "work", "would replace the current folder", overwrite=True)
    refused(tmp_path, "would replace the current folder", overwrite=True)


def test_a_link_is_followed_and_kept(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with OutputFolder(tmp_path / "link") as folder:
        fill(folder)
    assert (tmp_path / "link").is_symlink() and names(tmp_path / "real") == ["config.json", "llfc"]


def test_a_file_in_the_place_of_the_folder_or_its_parent_is_refused(tmp_path):
    (tmp_path / "file").touch()
    refused(tmp_path / "file", "this is a file")
    refused(tmp_path / "file" / "out", "is not a folder you may write to")


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="needs a file system that takes no folders")
def test_a_file_system_that_takes_no_folders_is_one_error():
    with pytest.raises(CheckpointError, match=r"^/proc/out: the output cannot be written"), OutputFolder("/proc/out"):
        pytest.fail("work began")


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="the super-user may write everywhere")
def test_a_parent_without_permission_is_refused(tmp_path):
    (tmp_path / "locked").mkdir(mode=0o500)
    refused(tmp_path / "locked" / "out", "is not a folder you may write to")


def test_what_someone_else_wrote_there_meanwhile_is_kept(tmp_path):
    finished_but_not_moved(tmp_path / "out", RECIPE)
    assert names(tmp_path) == [".out.partial", "out"] and names(tmp_path / "out") == ["theirs"]
    (tmp_path / "out").rename(tmp_path / "theirs")
    assert taken_up(tmp_path / "out")[3] == ["config.json", "llfc"]
    assert names(tmp_path) == ["out", "theirs"] and names(tmp_path / "out") == ["config.json", "llfc"]


def test_finished_work_of_unknown_inputs_is_never_taken_for_another_s(tmp_path):
    target, staging = tmp_path / "out", tmp_path / ".out.partial" / "output"
    finished_but_not_moved(target, {})
    (target / "theirs").unlink()
    for identity in ({}, RECIPE):
        with pytest.raises(CheckpointError, match="--restart"):
            taken_up(target, identity)
    assert (staging / "config.json").read_text() == "new"
    target.rmdir()
    staging.rename(target)  # as the error says
    with pytest.raises(CheckpointError, match="not empty"):
        taken_up(target, {})
    assert taken_up(target, {}, overwrite=True)[3] == [] and names(tmp_path) == ["out"]


# -- interrupted runs


def finished_but_not_moved(target, identity):
    output = OutputFolder(target)
    output.made_from(identity)
    message = r"could not be moved into place.*kept in .*\.out\.partial/output: .*rename that folder"
    with pytest.raises(CheckpointError, match=message), output as folder:
        fill(folder)
        target.mkdir()
        (target / "theirs").touch()


RECIPE = {"recipe": {"models": ["a", "b"], "weights": [0.5, 0.5]}}


def stopped(target, error, identity=RECIPE):
    """A run that finished a stage and a shard and then stopped."""
    output = OutputFolder(target, overwrite=True)
    output.made_from(identity)
    with pytest.raises(type(error)), output as folder:
        fill(folder)
        output.journal.finish("align", [1, None], [folder / "config.json"])
        output.journal.finish_shard("config.json", "digest")
        raise error


def taken_up(target, identity=RECIPE, **options):
    output = OutputFolder(target, **options)
    output.made_from(identity)
    with output as folder:
        return folder, output.journal.stages, output.journal.shards, names(folder)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(), StorageError("full"), MemoryError()])
def test_what_an_interrupted_run_finished_is_taken_up(tmp_path, error, caplog):
    caplog.set_level("INFO")
    stopped(tmp_path / "out", error)
    assert names(tmp_path) == [".out.partial"] and "run the same again to go on" in caplog.text
    _, stages, shards, held = taken_up(tmp_path / "out", {"recipe": {"models": ("a", "b"), "weights": (0.5, 0.5)}})
    assert stages["align"]["value"] == [1, None] and shards == {"config.json": "digest"}
    assert held == ["config.json", "llfc"] and names(tmp_path) == ["out"] and names(tmp_path / "out") == held
    assert "goes on after an interrupted run (finished: align, 1 weight files)" in caplog.text


def test_an_error_of_the_input_leaves_nothing(tmp_path):
    stopped(tmp_path / "out", CheckpointError("not finite"))
    assert names(tmp_path) == []


def test_without_anything_finished_nothing_is_kept_and_nothing_refused(tmp_path):
    output = OutputFolder(tmp_path / "out")
    output.made_from(RECIPE)
    with pytest.raises(KeyboardInterrupt), output:
        raise KeyboardInterrupt
    assert names(tmp_path) == []
    (tmp_path / ".out.partial" / "output").mkdir(parents=True)  # killed before the first stage was finished
    (tmp_path / ".out.partial" / "output" / "half").touch()
    assert taken_up(tmp_path / "out")[1:] == ({}, {}, [])
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"recipe": {"models": ["a", "b"], "weights": [0.25, 0.75]}}, "recipe.weights.0 was 0.5 and is 0.25"),
        ({"recipe": {"models": ["a", "b"]}}, "recipe.weights was [0.5, 0.5] and is absent"),
        ({**RECIPE, "inputs": {"a": 7}}, "inputs was absent and is {'a': 7}"),
        ({}, "recipe was"),
    ],
)
def test_an_interrupted_run_of_something_else_is_refused_until_it_is_discarded(tmp_path, changed, told):
    stopped(tmp_path / "out", KeyboardInterrupt())
    with pytest.raises(CheckpointError) as caught:
        taken_up(tmp_path / "out", changed)
    assert told in str(caught.value) and "--restart" in str(caught.value)
    assert taken_up(tmp_path / "out", changed, restart=True)[1:] == ({}, {}, [])
    assert names(tmp_path) == ["out"]


def test_a_stage_whose_file_changed_is_done_again(tmp_path):
    stopped(tmp_path / "out", KeyboardInterrupt())
    (tmp_path / ".out.partial" / "output" / "config.json").write_text("half")
    _, stages, shards, _ = taken_up(tmp_path / "out")
    assert stages == {} and shards == {"config.json": "digest"}


@pytest.mark.parametrize("content", ["", "{", "[]", '{"format": "other"}', '{"format": "hf_llfc.journal/1"}'])
def test_a_journal_that_cannot_be_read_is_one_error(tmp_path, content):
    stopped(tmp_path / "out", KeyboardInterrupt())
    (tmp_path / ".out.partial" / "journal.json").write_text(content)
    with pytest.raises(CheckpointError, match="begin anew with --restart"):
        taken_up(tmp_path / "out")
    assert taken_up(tmp_path / "out", restart=True)[1] == {}


def test_a_stranger_s_folder_is_left_alone(tmp_path):
    (tmp_path / ".out.partial").mkdir()
    (tmp_path / ".out.partial" / "notes.txt").touch()
    for restart in (False, True):
        with pytest.raises(CheckpointError, match=r"holds notes\.txt, which is not ours"):
            taken_up(tmp_path / "out", restart=restart)
    assert "notes.txt" in names(tmp_path / ".out.partial")


def test_two_runs_on_one_folder_exclude_each_other(tmp_path):
    with OutputFolder(tmp_path / "out") as folder:
        fill(folder)
        with pytest.raises(CheckpointError, match="another run is writing this output"), OutputFolder(tmp_path / "out"):
            pytest.fail("work began")
    assert names(tmp_path) == ["out"] and names(tmp_path / "out") == ["config.json", "llfc"]


@pytest.mark.parametrize("existing", [None, "checkpoint"])
@pytest.mark.parametrize("step", ["before", "between", "after"])
def test_a_run_stopped_while_it_takes_its_place_is_taken_up(tmp_path, monkeypatch, existing, step):
    target = tmp_path / "out"
    if existing == "checkpoint":
        earlier(target)
    rename, moves = Path.rename, []

    def stop(self, to):
        moves.append(to)
        last = to == target
        if step == "before" or (last and step == "between"):
            raise KeyboardInterrupt
        rename(self, to)
        if last:
            raise KeyboardInterrupt

    output = OutputFolder(target, overwrite=True)
    output.made_from(RECIPE)
    with pytest.raises(KeyboardInterrupt), output as folder:
        fill(folder)
        output.journal.finish("merge", None, [folder / "config.json"])
        monkeypatch.setattr(Path, "rename", stop)
    monkeypatch.undo()
    assert moves
    folder, stages, _, held = taken_up(target, overwrite=True)
    assert list(stages) == ["merge"] and held == ["config.json", "llfc"]
    assert names(tmp_path) == ["out"] and (target / "config.json").read_text() == "new"


def test_an_earlier_output_comes_back_when_its_replacement_is_discarded(tmp_path, monkeypatch):
    target = tmp_path / "out"
    earlier(target)
    stopped(target, KeyboardInterrupt())
    target.rename(tmp_path / ".out.partial" / "earlier")  # as if killed between the two moves
    with pytest.raises(CheckpointError, match="something else"):
        taken_up(target, {}, overwrite=True)
    assert (target / "config.json").read_text() == "old"


RACER = """
import sys, time
from pathlib import Path
from hf_llfc.checkpoints import OutputFolder
from hf_llfc.errors import CheckpointError

print("ready", flush=True)
sys.stdin.readline()
said = set()
for turn in range(30):
    try:
        with OutputFolder(Path(sys.argv[1]) / "new" / "out", overwrite=True) as folder:
            (folder / "config.json").write_text(sys.argv[2])
    except CheckpointError as error:
        said.add(str(error).partition(": ")[2].partition(";")[0])
print(sorted(said))
"""


def test_runs_that_race_for_one_folder_wait_or_say_that_another_is_at_work(tmp_path):
    command = [sys.executable, "-c", RACER, str(tmp_path)]
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    racers = [subprocess.Popen([*command, name], text=True, **pipes) for name in "abc"]
    for racer in racers:
        assert racer.stdout.readline() == "ready\n"
    for racer in racers:
        racer.stdin.write("go\n")
        racer.stdin.flush()
    ended = [racer.communicate(timeout=120) for racer in racers]
    assert [racer.returncode for racer in racers] == [0, 0, 0], [errors for _, errors in ended]
    for said, _ in ended:
        assert set(ast.literal_eval(said)) <= {"another run is writing this output"}
    assert (tmp_path / "new" / "out" / "config.json").read_text() in "abc"
    assert names(tmp_path / "new") == ["out"]


@pytest.mark.parametrize("name", ["n" * 250, "ü" * 127, "n" * 255], ids=["250", "127 of two bytes", "255"])
def test_an_output_may_have_any_name_that_a_file_system_takes(tmp_path, name):
    earlier(tmp_path / name)
    with pytest.raises(KeyboardInterrupt), OutputFolder(tmp_path / name, overwrite=True) as folder:
        fill(folder)
        raise KeyboardInterrupt
    with OutputFolder(tmp_path / name, overwrite=True) as folder:
        fill(folder)
    assert names(tmp_path) == [name] and (tmp_path / name / "config.json").read_text() == "new"


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("n" * 256, "the name is too long for a file system, which takes 255 bytes a name"),
        ("/".join(["d" * 200] * 25), "and 4000 a path"),
        ("ü" * 128, "the name is too long"),
    ],
    ids=["256", "deep", "256 bytes"],
)
def test_a_name_that_no_file_system_takes_is_one_error(tmp_path, path, expected):
    with pytest.raises(CheckpointError) as caught, OutputFolder(tmp_path / path):
        pytest.fail("work began")
    assert expected in str(caught.value) and not names(tmp_path)


@pytest.mark.parametrize("path", ["~nobody-here/x", "a\0b"])
def test_a_path_that_is_none_is_one_error(path):
    with pytest.raises(CheckpointError, match="the output cannot be called that"):
        OutputFolder(path)


def test_an_error_of_the_input_after_the_weights_keeps_them(tmp_path):
    output = OutputFolder(tmp_path / "out")
    with pytest.raises(CheckpointError, match="no more data\nThe weights are complete, and kept in"), output as folder:
        fill(folder)
        output.journal.finish(WEIGHTS_STAGE)
        raise CheckpointError("no more data")
    assert (tmp_path / ".out.partial" / "output" / "config.json").read_text() == "new"
