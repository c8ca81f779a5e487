"""A card as the Hub and GitHub show it, near enough to look at: Markdown without scripts, in their layout and colours.

`python -m tests.publishing.card_page OUTPUT_FOLDER PICTURE_FOLDER` takes pictures, light and dark, wide and narrow.
"""

import sys
from pathlib import Path

import yaml
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt

STYLE = """
:root { color-scheme: light dark; --ink: #1f2328; --ground: #ffffff; --line: #d1d9e0; --soft: #f6f8fa; --muted: #59636e;
  --link: #0969da; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #f0f6fc; --ground: #0d1117; --line: #3d444d; --soft: #151b23; --muted: #9198a1; --link: #4493f8; } }
body { margin: 0; color: var(--ink); background: var(--ground);
  font: 16px/1.5 -apple-system, "Segoe UI", "Noto Sans", Helvetica, Arial, sans-serif; }
main { max-width: 830px; margin: 0 auto; padding: 24px 16px; overflow-wrap: break-word; }
h1, h2 { border-bottom: 1px solid var(--line); padding-bottom: .3em; margin: 24px 0 16px; line-height: 1.25; }
p, ul, table, pre, blockquote, details { margin: 0 0 16px; }
a { color: var(--link); }
blockquote { padding: 0 1em; color: var(--muted); border-left: .25em solid var(--line); }
table { display: block; width: max-content; max-width: 100%; overflow: auto; border-collapse: collapse; }
th, td { padding: 6px 13px; border: 1px solid var(--line); }
tr:nth-child(2n) td { background: var(--soft); }
img { max-width: 100%; }
code { font: 85%/1.45 ui-monospace, "DejaVu Sans Mono", monospace; background: var(--soft); padding: .2em .4em;
  border-radius: 6px; }
pre { padding: 16px; overflow: auto; background: var(--soft); border-radius: 6px; }
pre code { padding: 0; background: none; }
.tags { color: var(--muted); font-size: 14px; }
"""


def write_card_page(folder: Path, target: Path) -> Path:
    """The README.md of a folder as HTML in a file that finds the folder's pictures.

    Args:
        folder: The output of a merge.
        target: The HTML file.
    """
    card = ModelCard.load(folder / "README.md")
    body = MarkdownIt("commonmark", {"html": True}).enable("table").render(card.text)
    metadata = yaml.safe_load(card.data.to_yaml())
    tags = " · ".join(str(metadata[key]) for key in ("pipeline_tag", "license", "base_model") if metadata.get(key))
    target.write_text(
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>card</title>'
        f'<meta name="viewport" content="width=device-width"><base href="{folder.resolve().as_uri()}/">'
        f'<style>{STYLE}</style></head><body><main><p class="tags">{tags}</p>{body}</main></body></html>',
        encoding="utf-8",
    )
    return target


def main() -> None:
    from playwright.sync_api import sync_playwright

    from tests.browser import installed

    folder, pictures = map(Path, sys.argv[1:3])
    pictures.mkdir(parents=True, exist_ok=True)
    page_file = write_card_page(folder, pictures / f"{folder.name}.html")
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=installed(), args=["--no-sandbox", "--disable-gpu"])
        for scheme, width in (("light", 1000), ("dark", 1000), ("light", 390)):
            page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
            page.goto(page_file.resolve().as_uri())
            page.evaluate("document.querySelectorAll('details').forEach(each => each.open = true)")
            page.screenshot(path=pictures / f"{folder.name}-{scheme}-{width}.png", full_page=True)
        browser.close()


if __name__ == "__main__":
    main()
