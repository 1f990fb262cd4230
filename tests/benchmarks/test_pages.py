"""Blocks of the pages: written where their marks are, the same at every time, and up to date."""

import shutil
from functools import partial
from pathlib import Path

import pytest

from benchmarks import pages, quickstart, report


def page(*blocks: tuple[str, str]) -> str:
    marked = (f"<!-- {name}: python -m somewhere --pages -->\n{text}\n<!-- end of {name} -->" for name, text in blocks)
    return "# A page\n\n" + "\n\nText between.\n\n".join(marked) + "\n"


def test_pages_of_today_are_up_to_date_and_writing_twice_changes_nothing(tmp_path):
    # Links are written for the folder of the page, so the copies lie in folders whose results are the kept ones.
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "results").symlink_to(report.RESULTS)
    copies = [tmp_path / original.relative_to(pages.ROOT) for original in pages.PAGES]
    results = tmp_path / "benchmarks" / "results"
    blocks = {**report.page_blocks(results), **quickstart.page_blocks(results)}
    for original, copy in zip(pages.PAGES, copies, strict=True):
        copy.parent.mkdir(exist_ok=True)
        shutil.copy(original, copy)
    for _ in range(2):
        pages.write_blocks(blocks, copies)
        for original, copy in zip(pages.PAGES, copies, strict=True):
            command = "python -m benchmarks.report --pages, python -m benchmarks.quickstart --pages"
            assert copy.read_text() == original.read_text(), f"{original} is not what is kept: {command}"


def test_every_place_with_a_blocks_marks_is_rewritten_and_nothing_else(tmp_path):
    first, second, none = tmp_path / "a.md", tmp_path / "deep" / "b.md", tmp_path / "absent.md"
    second.parent.mkdir()
    first.write_text(page(("numbers", "old"), ("speed", "stays"), ("numbers", "older\n\nstill")))
    second.write_text(page(("numbers", "")))
    pages.write_blocks({"numbers": lambda folder: rf"new \1 for {folder.name}"}, (first, second, none))
    new = rf"new \1 for {tmp_path.name}"
    assert first.read_text() == page(("numbers", new), ("speed", "stays"), ("numbers", new))
    assert second.read_text() == page(("numbers", r"new \1 for deep"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("# A page\n", "no page has the marks `<!-- speed: … -->` and `<!-- end of speed -->`; looked in "),
        (page(("speed-picture", "x")), "no page has the marks `<!-- speed: … -->`"),
        (page(("speed", "x")).replace("<!-- end of speed -->", ""), "has a mark `<!-- speed: … -->` without its "),
        (page(("speed", "x")).replace("end of speed", "end of speech"), "without its `<!-- end of speed -->`"),
    ],
)
def test_a_block_without_its_marks_is_refused_in_one_line_and_nothing_is_written(tmp_path, text, message):
    file, other = tmp_path / "a.md", tmp_path / "b.md"
    file.write_text(text)
    other.write_text(page(("numbers", "old")))
    with pytest.raises(ValueError, match=r"^[^\n]+$") as refused:
        pages.write_blocks({"numbers": lambda folder: "new", "speed": lambda folder: "new"}, (file, other))
    assert message in str(refused.value)
    assert other.read_text() == page(("numbers", "old"))


@pytest.mark.parametrize("command", [report, quickstart])
def test_the_commands_end_with_that_line(command, monkeypatch):
    monkeypatch.setattr("sys.argv", ["command", "--pages"])
    monkeypatch.setattr(command, "write_blocks", partial(pages.write_blocks, pages=(Path("absent.md"),)))
    with pytest.raises(SystemExit, match=r"^no page has the marks .*absent\.md$"):
        command.main()


def test_a_picture_is_linked_from_the_folder_of_its_page(tmp_path):
    file = tmp_path / "results" / "x" / "speed.png"
    assert pages.picture("speed", file, tmp_path) == "![speed](results/x/speed.png)"
    assert pages.picture("speed", file, tmp_path / "docs") == "![speed](../results/x/speed.png)"
