"""How Sphinx builds the site: `python -m sphinx -W --keep-going docs build/site`, with the extra `docs` installed."""

from sphinx.application import Sphinx

from hf_llfc import __version__

project = "hf-llfc"
author = "The hf-llfc authors"
copyright = author
release = version = __version__
html_title = f"hf-llfc {release}"
html_theme = "furo"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
pygments_style = "default"
pygments_dark_style = "github-dark"
html_show_sphinx = False
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]
exclude_patterns = ["_build"]
nitpicky = False

myst_heading_anchors = 3
highlight_language = "none"  # a block without a language is text
default_role = "literal"  # docstrings write `names` as Markdown does
copybutton_exclude = ".linenos, .gp, .go"

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
autodoc_class_signature = "mixed"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 90

# Pages of the repository that the site shows too; in the repository itself links lead to the files.
PAGES_ELSEWHERE = {
    "](../benchmarks/RESULTS.md": "](results.md",
    "](../benchmarks/results/": "](results/",
    "](../RESULTS.md": "](../results.md",  # as the pages of benchmarks/results write it
    "](../../docs/": "](../",
    "](../CHANGELOG.md": "](changelog.md",
    "](../CONTRIBUTING.md": "](contributing.md",
    "](docs/": "](",  # as CONTRIBUTING.md, one level up, writes them
}


def lead_to_pages(app: Sphinx, name: str, source: list[str]) -> None:
    """Turns links to files of the repository into links to their pages of the site."""
    for file, page in PAGES_ELSEWHERE.items():
        source[0] = source[0].replace(file, page)


def lead_included_to_pages(app: Sphinx, path: object, name: str, source: list[str]) -> None:
    """The same in a file that a page includes."""
    lead_to_pages(app, name, source)


def setup(app: Sphinx) -> None:
    """Called by Sphinx."""
    app.connect("source-read", lead_to_pages)
    app.connect("include-read", lead_included_to_pages)
