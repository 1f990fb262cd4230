"""The project's Markdown pages, taken apart: code blocks, links, headings, and what stands in backticks."""

import re
import shlex
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

from tests.support.paths import ROOT

PAGES = sorted(
    path
    for pattern in ("*.md", *(f"{folder}/**/*.md" for folder in ("prime_*", "benchmarks", "docs", "examples")))
    for path in ROOT.glob(pattern)
)
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)


@dataclass(frozen=True, slots=True)
class Block:
    """Fenced text of a page."""

    page: Path
    line: int
    language: str
    text: str
    prints: str | None
    """What the page says that it prints."""

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks(page: Path) -> list[Block]:
    text = page.read_text()
    found = list(FENCE.finditer(text))
    made = []
    for match, after in zip_longest(found, found[1:]):
        printed = after is not None and text[match.end() : after.start()].strip() == "prints"
        line = text.count("\n", 0, match.start()) + 1
        made.append(Block(page, line, match[1], match[2], after[2] if after and printed else None))
    return made


def of_language(language: str) -> list[Block]:
    return [block for page in PAGES for block in blocks(page) if block.language == language]


def prose(page: Path) -> str:
    """Without what is fenced."""
    return FENCE.sub("", page.read_text())


def spans(page: Path) -> list[str]:
    """What stands in backticks in the prose."""
    return re.findall(r"`([^`\n]+)`", prose(page))


def links(page: Path) -> list[str]:
    """Where the page points to within the repository, pictures included."""
    found = re.findall(r"\]\(([^)\s]+)\)", prose(page))
    return [link for link in found if not re.match(r"[a-z]+:", link)]


def anchors(page: Path) -> set[str]:
    """What a link can name behind #: of each heading its words, in lower case, joined by hyphens."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def commands(shell: str) -> list[list[str]]:
    """The words of each command of a shell block; variables before it and what follows # are left out."""
    joined = re.sub(r"\\\n\s*", " ", shell)
    found = []
    for line in joined.splitlines():
        words = shlex.split(line, comments=True)
        while words:
            end = next((i for i, word in enumerate(words) if word in ("&&", "&", "|")), len(words))
            command, words = words[:end], words[end + 1 :]
            while command and re.fullmatch(r"[A-Z_]+=.*", command[0]):
                command = command[1:]
            if command:
                found.append(command)
    return found
