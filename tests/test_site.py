"""The site of docs/: it builds without a warning, and its pages fit their windows, light and dark, wide and narrow."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [
    "index",
    "first_merge",
    "weights",
    "independent",
    "check",
    "report",
    "publish",
    "parents",
    "adapter",
    "large_models",
    "trainer",
    "api",
    "recipe",
    "results",
]
PUBLIC = ("align", "check", "diagnose", "inspect", "merge", "run", "publish", "register_adapter", "PermutationSpec")
# Boxes that stand out of the window to the right and are not inside one that scrolls.
TOO_WIDE = """() => [...document.querySelectorAll("article *")].filter(box => {
    for (let outer = box.parentElement; outer.tagName !== "ARTICLE"; outer = outer.parentElement)
        if (["auto", "scroll", "hidden"].includes(getComputedStyle(outer).overflowX))
            return false;
    return box.getBoundingClientRect().right > window.innerWidth + 1;
}).map(box => box.tagName + " " + box.textContent.slice(0, 60))"""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built once."""
    pytest.importorskip("sphinx", reason="the extra `docs` is not installed")
    pytest.importorskip("furo", reason="the extra `docs` is not installed")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "docs", str(folder)]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    # bitsandbytes, where it is installed, says so of itself when peft is loaded.
    told = [line for line in built.stderr.splitlines() if "kernels-community" not in line]
    assert built.returncode == 0 and not told, built.stderr
    return folder


def test_the_api_page_has_every_public_name(site: Path) -> None:
    import hf_llfc

    page = (site / "api.html").read_text(encoding="utf-8")
    missing = [name for name in hf_llfc.__all__ if name != "__version__" and name not in page]
    assert missing == []
    assert all(f'id="hf_llfc.{name}"' in page for name in PUBLIC)


@pytest.mark.browser
@pytest.mark.parametrize("name", PAGES)
def test_a_page_fits_its_window(site: Path, browse, name: str) -> None:
    page = browse(f"file://{site}/{name}.html")
    for width in (1280, 380):
        page.set_viewport_size({"width": width, "height": 900})
        assert page.evaluate(TOO_WIDE) == [], f"at {width}"
    assert page.evaluate("[...document.images].every(image => image.naturalWidth > 0)")


@pytest.mark.browser
def test_dark_pages_are_dark_and_their_pictures_are_not(site: Path, browse) -> None:
    page = browse(f"file://{site}/report.html", dark=True)
    background = "box => getComputedStyle(box).backgroundColor"
    assert max(map(int, re.findall(r"\d+", page.eval_on_selector("body", background))[:3])) < 60
    assert page.eval_on_selector("article img", background) == "rgb(255, 255, 255)"


@pytest.mark.browser
def test_every_page_is_reached_from_the_first(site: Path, browse) -> None:
    page = browse(f"file://{site}/index.html")
    reached = set(page.evaluate("[...document.querySelectorAll('.sidebar-tree a')].map(a => a.href.split('/').pop())"))
    assert {path.name for path in site.glob("*.html")} - reached <= {
        "index.html", "search.html", "genindex.html", "py-modindex.html",
    }  # fmt: skip
