"""Says whether built pages need a network: `python -m tests.offline docs/_build/html`.

A page may link to the web; it may not load anything from there to be shown: no script, style sheet, picture, frame or
font. A formula must stand on the page as MathML.
"""

import re
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

LOADED = {"src", "srcset", "data", "poster"}
REMOTE = re.compile(r"""\s*(?:https?:)?//""")
REMOTE_STYLE = re.compile(r"""(?:@import\s+|url\()\s*["']?\s*((?:https?:)?//[^"')\s]+)""")
LINKED = {"stylesheet", "icon", "preload", "modulepreload", "preconnect", "dns-prefetch", "manifest"}


class Page(HTMLParser):
    """What one page loads from elsewhere, and which formulas it leaves to somebody else."""

    def __init__(self) -> None:
        super().__init__()
        self.faults: list[str] = []
        self.inside = ""
        self.formula = ""  # the tag of a formula that has shown no MathML so far

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        loaded = {name: value for name, value in values.items() if name in LOADED}
        if tag == "link" and LINKED & set(values.get("rel", "").split()):
            loaded["href"] = values.get("href", "")
        for name, value in loaded.items():
            if REMOTE.match(value):
                self.faults.append(f"<{tag} {name}={value}>")
        self.faults += [f"style={url}" for url in REMOTE_STYLE.findall(values.get("style", ""))]
        if tag in {"script", "style"}:
            self.inside = tag
        if tag == "math":
            self.formula = ""
        elif "math" in values.get("class", "").split():
            self.formula = tag

    def handle_endtag(self, tag: str) -> None:
        self.inside = ""
        if tag == self.formula:
            self.faults.append("a formula without MathML")
            self.formula = ""

    def handle_data(self, data: str) -> None:
        if self.inside == "style":
            self.faults += [f"@import {url}" for url in REMOTE_STYLE.findall(data)]
        elif self.inside == "script":
            self.faults += [f"import {url}" for url in re.findall(r"""import\s*\(?["'](https?://[^"']+)""", data)]


def faults(folder: Path) -> Iterator[str]:
    """One line for each thing that a page or a style sheet under the folder needs from the network."""
    pages = sorted(folder.rglob("*.html"))
    if not pages:
        yield f"{folder}: no page"
    for path in pages:
        page = Page()
        page.feed(path.read_text(encoding="utf-8"))
        yield from (f"{path.relative_to(folder)}: {fault}" for fault in page.faults)
    for path in sorted(folder.rglob("*.css")):
        for url in REMOTE_STYLE.findall(path.read_text(encoding="utf-8")):
            yield f"{path.relative_to(folder)}: {url}"


def main(folder: Path) -> int:
    """Print what needs a network; the exit status says whether there was anything."""
    found = list(faults(folder))
    for fault in found:
        print(fault, file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
