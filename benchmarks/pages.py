"""Blocks of the Markdown pages that a command writes from kept results.

A block stands between two marks on lines of their own, in whichever pages have them:

    <!-- NAME: the command that writes it -->
    …
    <!-- end of NAME -->
"""

import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = (ROOT / "README.md", ROOT / "benchmarks" / "README.md", ROOT / "docs" / "when-does-prime-help.md")

Block = Callable[[Path], str]
"""What stands between the marks in a page of the given folder."""


def write_blocks(blocks: Mapping[str, Block], pages: Sequence[Path] = PAGES) -> None:
    """Put each block, by its name, between its marks in every page that has them.

    Raises:
        ValueError: a block has its marks in no page, or an end is missing; nothing is written then.
    """
    texts = {page: page.read_text() for page in pages if page.exists()}
    for name, block in blocks.items():
        begin, end = f"<!-- {name}: ", f"<!-- end of {name} -->"
        marked = [page for page, text in texts.items() if begin in text]
        if not marked:
            looked_in = " and ".join(_link(page, ROOT) for page in pages)
            raise ValueError(f"no page has the marks `{begin}… -->` and `{end}`; looked in {looked_in}")
        for page in marked:
            changed = _with_block(texts[page], begin, block(page.parent), end)
            if changed is None:
                raise ValueError(f"{_link(page, ROOT)} has a mark `{begin}… -->` without its `{end}`")
            texts[page] = changed
    for page, text in texts.items():
        if text != page.read_text():
            page.write_text(text)


def _with_block(text: str, begin: str, block: str, end: str) -> str | None:
    """The text with the block between its marks, wherever it has them; None where an end is missing."""
    before, *parts = re.split(rf"^({re.escape(begin)}.*-->)$", text, flags=re.M)
    for mark, rest in zip(parts[::2], parts[1::2], strict=True):
        _, found, after = rest.partition(f"\n{end}\n")
        if not found:
            return None
        before += f"{mark}\n{block}\n{end}\n{after}"
    return before


def picture(what: str, file: Path, folder: Path) -> str:
    """The line that shows `file` in a page of `folder`."""
    return f"![{what}]({_link(file, folder)})"


def _link(file: Path, folder: Path) -> str:
    return Path(os.path.relpath(file, folder)).as_posix()
