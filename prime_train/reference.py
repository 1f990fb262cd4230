"""`prime-train keys` and `prime-train metrics`: references that are searched by words, printed, or written as Markdown.

What they say stands where it is decided, keys in `config/keys.py` and metrics in `show/metrics.py`.
"""

import difflib
import json
import re
import shutil
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rich.console import Console
from rich.text import Text

from .config.settings import ConfigError, sections
from .show.metrics import METRICS, RECORDS, Metric

NARROWEST = 40
"""Columns of text, however narrow the terminal."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """A key, a metric or a family of metrics."""

    name: str
    kind: str
    """What a key may be, the unit of a metric."""
    default: str = ""
    """Of a key, as the command line would say it."""
    meaning: str
    members: tuple[str, ...] = ()
    """Names in the family."""

    @property
    def names(self) -> tuple[str, ...]:
        return (self.name, *self.members)

    @property
    def text(self) -> str:
        """Everything that is said of it."""
        return " ".join((*self.names, self.kind, self.default, self.meaning)).lower()


@dataclass(frozen=True, slots=True, kw_only=True)
class Chapter:
    """Entries that belong together: a section of the configuration, metrics with a prefix in common."""

    name: str
    title: str
    """As it stands before its entries in print."""
    meaning: str
    entries: tuple[Entry, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Reference:
    """All of one kind."""

    command: str
    entry: str
    chapter: str
    """What an entry and a chapter are called."""
    title: str
    intro: str
    columns: tuple[str, ...]
    """Of the Markdown tables."""
    chapters: tuple[Chapter, ...]


# -- what there is --


def keys() -> Reference:
    """All configuration keys."""
    return Reference(
        command="keys", entry="key", chapter="section", title="Configuration keys",
        intro="A key stands in its [section] of a TOML file, or behind one on the command line: `--section.key value`. "
        "There `none` unsets an optional key, and `a,b` gives several values.",
        columns=("key", "values", "default", "meaning"),
        chapters=tuple(
            Chapter(
                name=name, title=f"[{name}]", meaning=_one_line(section.__doc__ or ""),
                entries=tuple(
                    Entry(
                        name=f"{name}.{key}", kind=_kind(schema), default=_spelled(schema["default"]),
                        meaning=_one_line(schema.get("description", "")),
                    )
                    for key, schema in section.model_json_schema()["properties"].items()
                ),
            )
            for name, section in sections().items()
        ),
    )  # fmt: skip


def metrics() -> Reference:
    """All metrics of a run."""
    return Reference(
        command="metrics", entry="metric", chapter="group", title="Metrics", intro=_one_line(RECORDS),
        columns=("metric", "unit", "meaning"),
        chapters=tuple(
            Chapter(
                name=group.prefix, title=f"{group.prefix}/", meaning=f"{group.meaning} Written {group.when}.",
                entries=tuple(
                    Entry(
                        name=metric.name, kind=metric.unit, members=metric.names if metric.values else (),
                        meaning=_said(metric),
                    )
                    for metric in group.metrics
                ),
            )
            for group in METRICS
        ),
    )  # fmt: skip


def _said(metric: Metric) -> str:
    values = f" {metric.placeholder} is one of {', '.join(metric.values)}." if metric.values else ""
    return metric.meaning + values + (f" Only if {metric.only_if}." if metric.only_if else "")


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _kind(schema: dict[str, Any]) -> str:
    """What a key may be, from its JSON schema: `integer ≥ 1`, `ce | dpo`, `text or none`."""
    if "anyOf" in schema:
        return " or ".join(_kind(option) for option in schema["anyOf"])
    if "enum" in schema:
        return " | ".join(schema["enum"])
    if schema["type"] == "array":
        return f"any of {', '.join(schema['items']['enum'])}"
    if schema["type"] in ("integer", "number"):
        return f"{schema['type']}{_bounds(schema)}"
    if schema["type"] == "string":
        return str(schema.get("format", "text"))
    return {"boolean": "true | false", "null": "none"}[schema["type"]]


def _bounds(schema: dict[str, Any]) -> str:
    low, above = schema.get("minimum"), schema.get("exclusiveMinimum")
    high = schema["exclusiveMaximum"] - 1 if "exclusiveMaximum" in schema else schema.get("maximum")
    if high is not None:
        return f" from {low} to {high}"
    return f" ≥ {low}" if low is not None else f" > {above}" if above is not None else ""


def _spelled(default: Any) -> str:
    """A default as the command line would say it."""
    if isinstance(default, list):
        return ",".join(default) or "none"
    if isinstance(default, str):
        return default or '""'
    return "none" if default is None else json.dumps(default)


# -- what is asked for --


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """Chapters with the entries asked for, and the names of others that have the words, too."""

    chapters: tuple[Chapter, ...]
    others: tuple[str, ...] = ()


def find(reference: Reference, words: Sequence[str]) -> Found:
    """What has all the words. A chapter's name asks for the chapter, an entry's full name for the entry; otherwise
    words are looked for in names, and where none has them, in everything that is said.

    Raises:
        ConfigError: nothing has them; with the nearest names.
    """
    wanted = [word.lower() for word in words]
    entries = [entry for chapter in reference.chapters for entry in chapter.entries]
    named = [entry for entry in entries if all(_in_name(entry, word) for word in wanted)]
    saying = [entry for entry in entries if all(_in_name(entry, word) or _in_text(entry, word) for word in wanted)]
    if len(wanted) == 1:
        if exact := [entry for entry in entries if wanted[0] in [name.lower() for name in entry.names]]:
            return Found(chapters=_with(reference, exact))
        for chapter in reference.chapters:
            if chapter.name == wanted[0]:
                return Found(chapters=(chapter,), others=_names(named, chapter.entries))
    if named:
        return Found(chapters=_with(reference, named), others=_names(saying, named))
    if saying:
        return Found(chapters=_with(reference, saying))
    asked = " and ".join(map(repr, words))
    raise ConfigError(f"no {reference.entry} has {asked} in its name or its description{_nearest(reference, wanted)}")


def _in_name(entry: Entry, word: str) -> bool:
    return any(word in name.lower() for name in entry.names)


def _in_text(entry: Entry, word: str) -> bool:
    """Where a word of the text begins: `rate` is in "learning rate", not in "temperature"."""
    return re.search(rf"(?<!\w){re.escape(word)}", entry.text) is not None


def _with(reference: Reference, entries: Sequence[Entry]) -> tuple[Chapter, ...]:
    """The chapters that have some of the entries, with those alone."""
    chapters = (replace(c, entries=tuple(e for e in c.entries if e in entries)) for c in reference.chapters)
    return tuple(chapter for chapter in chapters if chapter.entries)


def _names(entries: Sequence[Entry], without: Sequence[Entry]) -> tuple[str, ...]:
    return tuple(entry.name for entry in entries if entry not in without)


def _nearest(reference: Reference, words: Sequence[str]) -> str:
    """Names that resemble the words, whole or in one part."""
    known: dict[str, list[str]] = {chapter.name: [chapter.name] for chapter in reference.chapters}
    for entry in (entry for chapter in reference.chapters for entry in chapter.entries):
        for name in entry.names:
            for part in {name.lower(), *re.split(r"[./]", name.lower())[1:], *re.split(r"[./_]", name.lower())[1:]}:
                if entry.name not in known.setdefault(part, []):
                    known[part].append(entry.name)
    close = [name for word in words for part in difflib.get_close_matches(word, known, n=3) for name in known[part]]
    if close:
        return f"; did you mean {' or '.join(list(dict.fromkeys(close))[:3])}?"
    return f"; {reference.chapter}s are {', '.join(chapter.name for chapter in reference.chapters)}"


# -- how it is shown --


def show(reference: Reference, words: Sequence[str]) -> None:
    """Prints what the words ask for: all of it without any, as a page of Markdown for `--markdown`.

    Raises:
        ConfigError: nothing has the words, or there is no such option.
    """
    if list(words) == ["--markdown"]:
        print(markdown(reference), end="")
        return
    for word in words:
        if word.startswith("-"):
            raise ConfigError(f"{reference.command} takes words to search for, or --markdown alone, found {word}")
    found = find(reference, words) if words else Found(chapters=reference.chapters)
    width = max(NARROWEST, shutil.get_terminal_size().columns)
    lines = list(_lines(found, "" if words else reference.intro, width))
    # Text is wrapped already; bold is for terminals alone.
    Console(width=width, highlight=False).print(Text("\n").join(lines), soft_wrap=True)


def _lines(found: Found, intro: str, width: int) -> Iterator[Text]:
    """Each entry under a line with its name, and chapters apart from each other."""
    blocks = [[Text(line) for line in textwrap.wrap(intro, width)]] if intro else []
    for chapter in found.chapters:
        block = list(_headed(chapter.title, chapter.meaning, width, indent=""))
        for entry in chapter.entries:
            facts = f"{entry.kind}; default {entry.default}" if entry.default else entry.kind
            block += _headed(entry.name, facts, width, indent="  ")
            block += [Text(line) for line in _wrapped(entry.meaning, width, indent=" " * 6)]
        blocks.append(block)
    if found.others:
        blocks.append([Text(line) for line in _wrapped(f"Also in {', '.join(found.others)}.", width, indent="")])
    for i, block in enumerate(blocks):
        yield from ([Text("")] if i else [])
        yield from block


def _headed(name: str, text: str, width: int, indent: str) -> Iterator[Text]:
    """The name in bold, then the text, further lines of which are indented."""
    for i, line in enumerate(_wrapped(f"{name}  {text}", width, indent, f"{indent}    ")):
        shown = Text(line)
        if i == 0:
            shown.stylize("bold", len(indent), len(indent) + len(name))
        yield shown


def _wrapped(text: str, width: int, indent: str, further: str | None = None) -> list[str]:
    """Words that are too long for a line, as names are, stay whole."""
    return textwrap.wrap(
        text, width, initial_indent=indent, subsequent_indent=indent if further is None else further,
        break_long_words=False, break_on_hyphens=False,
    )  # fmt: skip


def markdown(reference: Reference) -> str:
    """The whole reference as a page."""
    made = f"<!-- Made by `prime-train {reference.command} --markdown`; `make reference` writes this file. -->"
    parts = [made, "", f"# {reference.title}", "", reference.intro]
    for chapter in reference.chapters:
        parts += ["", f"## {chapter.name}", "", chapter.meaning, ""]
        parts += [_row(reference.columns), "|" + "---|" * len(reference.columns)]
        for entry in chapter.entries:
            default = (f"`{entry.default}`",) if entry.default else ()
            parts.append(_row((f"`{entry.name}`", entry.kind, *default, entry.meaning)))
    return "\n".join(parts) + "\n"


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
