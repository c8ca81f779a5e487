"""`hf llfc …` as users of the Hub's own command run it."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from hf_llfc import __version__
from hf_llfc.cli.register_extension import register
from hf_llfc.errors import LLFCError
from tests.runs import byte_llama, saved

ROOT = Path(__file__).parents[2]
HF = shutil.which("hf", path=str(Path(sys.executable).parent))

# What pip writes for the entry point `hf-llfc = "hf_llfc.cli:main"` of pyproject.toml.
CONSOLE_SCRIPT = f"""#!{sys.executable}
import sys
from hf_llfc.cli import main
if __name__ == "__main__":
    sys.argv[0] = sys.argv[0].removesuffix(".exe")
    sys.exit(main())
"""

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="a console script there is a program")


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home of one's own: the client keeps its extensions below it."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_HUB_DISABLE_UPDATE_CHECK", "1")
    return tmp_path / "home"


def console_script(folder: Path) -> Path:
    folder.mkdir(parents=True)
    script = folder / "hf-llfc"
    script.write_text(CONSOLE_SCRIPT)
    script.chmod(0o755)
    return script


def laid_out(home: Path) -> Path:
    """The extension as `hf extensions install OWNER/hf-llfc` leaves it: an environment with the script, a manifest."""
    from datetime import datetime, timezone

    from huggingface_hub.cli.extensions import ExtensionManifest, _get_extension_dir, _get_venv_bin_path

    folder = _get_extension_dir("llfc")
    assert folder.is_relative_to(home)
    script = console_script(_get_venv_bin_path(folder / "venv", "hf-llfc").parent)
    ExtensionManifest(
        owner="someone",
        repo="hf-llfc",
        repo_id="someone/hf-llfc",
        short_name="llfc",
        executable_path=str(script),
        type="python",
        installed_at=datetime.now(timezone.utc),
        description="Align, merge and diagnose",
        commit_sha="0" * 40,
    ).save(folder)
    return script


def hf(*words: str) -> subprocess.CompletedProcess[str]:
    assert HF is not None
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "200"}
    return subprocess.run([HF, *words], env=environment, capture_output=True, text=True, timeout=100, check=False)


def test_the_repository_is_one_that_the_client_installs_with_pip() -> None:
    # A file of this name at the root would be taken for the extension itself.
    assert not (ROOT / "hf-llfc").exists()
    assert 'hf-llfc = "hf_llfc.cli:main"' in (ROOT / "pyproject.toml").read_text()


def test_an_installed_extension_passes_words_and_exit_codes_on(home: Path, tmp_path: Path) -> None:
    laid_out(home)
    done = hf("llfc", "--version")
    assert (done.returncode, done.stdout) == (0, f"hf-llfc {__version__}\n")
    assert hf("extensions", "exec", "llfc", "--version").stdout == f"hf-llfc {__version__}\n"
    assert "llfc" in hf("--help").stdout
    wrong = hf("llfc", "mrege", "a", "b")
    assert wrong.returncode == 2 and "did you mean 'merge'" in wrong.stderr
    a, b = (saved(byte_llama(0, intermediate_size=size), tmp_path / name) for name, size in (("a", 40), ("b", 48)))
    answer = hf("llfc", "check", str(a), str(b), "--level", "0", "--format", "json")
    assert answer.returncode == 1, answer.stderr
    assert json.loads(answer.stdout)["answer"] == "do not merge"


def test_the_installed_package_registers_itself(home: Path, tmp_path: Path) -> None:
    script = console_script(tmp_path / "bin")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    for _ in range(2):  # twice is as good as once
        done = subprocess.run(
            [script, "register-extension"], env=environment, capture_output=True, text=True, check=True
        )
        assert done.stdout == "hf llfc\n"
    assert hf("llfc", "--version").stdout == f"hf-llfc {__version__}\n"
    assert hf("llfc", "mrege").returncode == 2
    assert "hf llfc" in hf("extensions", "list").stdout
    assert hf("extensions", "remove", "llfc").returncode == 0
    assert script.is_file()
    assert hf("llfc", "--version").returncode != 0


def test_an_extension_that_the_client_installed_is_left_alone(home: Path, tmp_path: Path) -> None:
    script = laid_out(home)
    manifest = script.parents[2] / "manifest.json"
    before = manifest.read_text()
    with pytest.raises(LLFCError, match="holds an extension already; remove it first: hf extensions remove llfc"):
        register(tmp_path / "other")
    assert manifest.read_text() == before
    manifest.unlink()
    with pytest.raises(LLFCError, match="remove it first"):
        register(tmp_path / "other")


def test_without_a_console_script_one_is_told_to_install(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(sys, "argv", ["pytest"])
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    with pytest.raises(LLFCError, match="there is no command hf-llfc in this environment"):
        register()


@pytest.mark.slow
def test_the_clients_own_installer_installs_it(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of the installer runs: only the address is a copy of this tree, and dependencies are those that are here."""
    from huggingface_hub.cli import extensions

    source = tmp_path / "hf-llfc"
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(".git", "runs", "demo", "*.egg-info", "__pycache__"))
    run = subprocess.run

    def run_here(words: list[str], **options: object) -> object:
        if "install" in words:
            folder = Path(words[words.index("--python") + 1] if "--python" in words else words[0]).parents[2]
            site = next(folder.glob("lib/python*/site-packages"))
            here = [path for path in sys.path if Path(path).name == "site-packages"]
            (site / "here.pth").write_text("\n".join(here) + "\n")
            words = [*words[:-1], "--no-deps", "--no-build-isolation", str(source)]
        return run(words, **options)  # type: ignore[call-overload]

    monkeypatch.setattr(extensions.subprocess, "run", run_here)
    manifest = extensions._install_extension(owner="someone", repo_name="hf-llfc", short_name="llfc")
    assert manifest.type == "python" and Path(manifest.executable_path).is_relative_to(home)
    monkeypatch.setattr(extensions.subprocess, "run", run)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([str(HF), "llfc", "--version"], env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, f"hf-llfc {__version__}\n"), done.stderr
