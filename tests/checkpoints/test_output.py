"""The output folder: complete or not there at all, and nobody else's files are touched."""

import os
import stat

import pytest

from hf_llfc.checkpoints import OutputFolder
from hf_llfc.errors import CheckpointError


def fill(folder, text="new"):
    (folder / "config.json").write_text(text)
    (folder / "llfc").mkdir()


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
        assert not target.exists() and folder.parent == tmp_path
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
    if existing is not None:
        target.mkdir()
    if existing == "checkpoint":
        fill(target, "old")
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
    (tmp_path / "out").mkdir()
    fill(tmp_path / "out", "old")
    (tmp_path / "out" / "model-00009-of-00009.safetensors").touch()
    refused(tmp_path / "out", "not empty")
    with OutputFolder(tmp_path / "out", overwrite=True) as folder:
        fill(folder)
        assert (tmp_path / "out" / "config.json").read_text() == "old"
    assert names(tmp_path / "out") == ["config.json", "llfc"] and names(tmp_path) == ["out"]
    assert (tmp_path / "out" / "config.json").read_text() == "new"


def test_overwriting_never_removes_what_is_no_checkpoint(tmp_path, monkeypatch):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "one.jpg").touch()
    refused(tmp_path / "photos", "holds no checkpoint that could be overwritten", overwrite=True)
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
    with (
        pytest.raises(CheckpointError, match="could not be moved into place"),
        OutputFolder(tmp_path / "out") as folder,
    ):
        fill(folder)
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "theirs").touch()
    assert names(tmp_path) == ["out"] and names(tmp_path / "out") == ["theirs"]
