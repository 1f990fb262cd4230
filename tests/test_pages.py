"""What the pages show is what happens: code runs, commands and keys exist, links lead somewhere."""

import ast
import contextlib
import io
import os
import re
import runpy
import sys
import tomllib
from functools import cache
from importlib.util import find_spec

import pytest
from transformers import Qwen2Config

from prime_kernels.devices import GPU_FLOP_PER_BYTE
from prime_kernels.plan import plan_one_pass
from prime_train import cli
from prime_train.cli import USAGE
from prime_train.config.keys import Config
from prime_train.config.settings import load_config, shipped
from prime_train.show.metrics import METRICS
from tests.support.pages import PAGES, anchors, blocks, commands, links, of_language, prose, spans
from tests.support.paths import ROOT
from tests.support.processes import run_alone
from tests.support.shapes import SHAPES

NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
OF_RUNS = ("run", "sft", "eval", "plan", "doctor")
"""Commands that take a configuration and its keys."""
FLAGS = {"run": {"--dry-run": 0, "--force": 0}, "plan": dict.fromkeys(
    ("--gpus", "--memory", "--host-memory", "--tflops", "--bandwidth"), 1)}  # fmt: skip
OURS = re.compile(r"(\S*=\S+ )*(\S*/)?(make|prime-train|python3?|pytest|torchrun) [\w.-]")
OTHERS = ("pip", "vllm", "curl")
"""Programs that are not ours, and that no test runs."""


def test_the_front_page_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 160


def test_pages_are_where_they_are_looked_for():
    wanted = {
        "README.md", "CHANGELOG.md", "CONTRIBUTING.md", "benchmarks/README.md", "docs/when-does-prime-help.md",
        "examples/README.md", "prime_kernels/README.md", "prime_train/README.md", "prime_train/config/KEYS.md",
        "prime_train/rollout/vllm/README.md", "prime_train/show/METRICS.md", "prime_train/verify/README.md",
    }  # fmt: skip
    assert wanted <= set(NAMES)


def executed(directory, code):
    os.chdir(directory)
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(compile(code, "page", "exec"), {"__name__": "__main__"})
    return printed.getvalue()


@pytest.mark.parametrize("block", of_language("python"), ids=str)
def test_a_python_block_runs_and_prints_what_its_page_says(tmp_path, block):
    ended = run_alone(executed, tmp_path, block.text)
    assert ended.code == 0, ended
    if block.prints is not None:
        assert ended.result == block.prints


@pytest.mark.parametrize("block", of_language("toml"), ids=str)
def test_a_toml_block_is_a_configuration(block):
    Config.model_validate(tomllib.loads(block.text))


def test_the_front_page_names_every_recipe():
    table = (ROOT / "README.md").read_text().partition("| recipe |")[2].partition("\n\n")[0]
    assert sorted(re.findall(r"^\| `([\w.-]+)` \|", table, re.M)) == shipped()


@pytest.mark.parametrize("recipe", SHAPES)
def test_the_memory_that_the_front_page_says_is_planned_is_the_plans(tmp_path, capsys, recipe):
    row = rf"^\| `{re.escape(recipe)}` \|.*\| (\d+) \| ([\d.]+) GiB \|$"
    [(gpus, planned)] = re.findall(row, (ROOT / "README.md").read_text(), re.M)
    Qwen2Config(**SHAPES[recipe]).save_pretrained(tmp_path)
    assert cli.main(["plan", recipe, "--model.policy", str(tmp_path), "--gpus", gpus, "--memory", "80"]) == 0
    [needed] = re.findall(r"needs ([\d.]+) of", capsys.readouterr().out)[-1:]
    assert needed == planned


def test_every_block_says_in_which_language_it_is_or_is_output_or_a_drawing():
    assert {block.language for page in PAGES for block in blocks(page)} <= {"python", "sh", "toml", "json", ""}


@pytest.mark.parametrize("block", of_language("sh"), ids=str)
def test_the_commands_of_a_shell_block_exist_and_take_what_they_are_given(block):
    assert commands(block.text)
    assert [said for command in commands(block.text) if (said := wrong(command))] == []


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_commands_in_the_text_exist(page):
    ours = [span for span in spans(page) if OURS.match(span)]
    assert [said for span in ours for command in commands(span) if (said := wrong(command, whole=False))] == []


def wrong(words, *, whole=True):
    """What is wrong with a command; empty where nothing is.

    Args:
        whole: it is to be run as it stands; otherwise words in capitals, and what is left out, are the reader's.
    """
    words = words[words.index("-m") - 1 :] if words[0] == "torchrun" else list(words)
    if words[:3] == [words[0], "-m", "prime_train"]:
        words = ["prime-train", *words[3:]]
    program = words[0].rpartition("/")[2]
    if program == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M)
        return "" if all(word in targets for word in words[1:] if "=" not in word) else f"no target: {words}"
    if program == "prime-train" and words[1:]:
        return wrong_call(words[1], words[2:], whole)
    if program == "pytest":
        return "" if all((ROOT / word).exists() for word in words[1:] if "/" in word) else f"no file: {words}"
    if program in ("python", "python3"):
        if words[1] != "-m":
            return "" if (ROOT / words[1]).is_file() else f"no file: {words}"
        return "" if words[2] in ("venv", "pip") else wrong_module(words[2], words[3:])
    return "" if program in (*OTHERS, "prime-train") else f"not known: {words}"


def wrong_call(command, words, whole):
    if not re.search(rf"^  {re.escape(command)} ", USAGE, re.M):
        return f"no command: {command}"
    if command in OF_RUNS:
        rest, flags = [], FLAGS.get(command, {})
        words = ["quickstart" if word == "CONFIG" else word for word in words if word != "…"]
        while words:
            word = words.pop(0)
            if word in flags:
                words = words[flags[word] :]
            else:
                rest.append(word)
        if rest and not rest[0].startswith("-"):
            load_config("quickstart" if rest[0].endswith(".toml") else rest[0], rest[1:])
        elif whole:
            return f"no configuration: {command}"
        return ""
    options = {word.partition("=")[0] for word in words if word.startswith("--")}
    missing = sorted(option for option in options if not re.search(rf"{option}\b", help_of("prime_train", command)))
    return f"prime-train {command} has no {', '.join(missing)}" if missing else ""


def wrong_module(module, words):
    if find_spec(module) is None:
        return f"no module {module}"
    options = {word for word in words if word.startswith("--")}
    missing = sorted(option for option in options if not re.search(rf"{option}\b", help_of(module)))
    return f"{module} has no {', '.join(missing)}" if missing else ""


@cache
def help_of(module, *words):
    ended = run_alone(helped, module, words)
    assert ended.code == 0, ended
    return ended.result


def helped(module, words):
    sys.argv = [module, *words, "--help"]
    with contextlib.redirect_stdout(io.StringIO()) as printed, contextlib.suppress(SystemExit):
        runpy.run_module(module, run_name="__main__")
    return printed.getvalue()


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_every_link_of_a_page_leads_somewhere(page):
    for link in links(page):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert target.is_relative_to(ROOT), link
        assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize("page", [page for page in PAGES if "prime_kernels" not in page.parts], ids=str)
def test_keys_that_a_page_names_exist(page):
    sections = Config.model_fields
    for span in spans(page):
        for section, key in re.findall(rf"(?<![\w./])({'|'.join(sections)})\.(?!py\b)(\w+)", span):
            assert key in sections[section].annotation.model_fields, span


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_metrics_that_a_page_names_exist(page):
    known = {name for group in METRICS for metric in group.metrics for name in (metric.name, *metric.names)}
    prefixes = "|".join(group.prefix for group in METRICS)
    for span in spans(page):
        for name in re.findall(rf"(?<![\w./-])(?:{prefixes})/[\w-]+(?![\w/.])", span):
            assert name in known, span


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_a_page_has_no_fences_and_links_that_these_tests_do_not_read(page):
    unread = r"```|~~~|<(?:a|img)\b|\]\[|^\[[^\]]+\]:|\]\([^)]*\s[^)]*\)"
    assert re.findall(unread, prose(page), re.M) == []


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_files_that_a_page_names_exist(page):
    places = (page.parent, ROOT, ROOT / "prime_train", ROOT / "prime_kernels")
    for span in spans(page):
        if re.fullmatch(r"[\w-]+(/[\w-]+)+(\.py|\.toml|/)", span):
            assert any((place / span).exists() for place in places), span


@cache
def texts():
    """Every text of the trainer's code, of those with values in them the parts in order."""
    found = []
    for path in (ROOT / "prime_train").rglob("*.py"):
        tree = ast.parse(path.read_text())
        docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        for node in (node for node in ast.walk(tree) if id(node) not in docstrings):
            if isinstance(node, ast.JoinedStr):
                found.append("".join(v.value if isinstance(v, ast.Constant) else "\0" for v in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return found


def test_messages_in_the_troubleshooting_table_are_those_of_the_code():
    table = (ROOT / "prime_train" / "README.md").read_text().partition("## Troubleshooting")[2]
    rows = re.findall(r"^\| (`.+?) \| ", table, re.M)
    assert len(rows) == len(re.findall(r"^\|", table, re.M)) - 2 > 10
    for message in (span for row in rows for span in re.findall(r"`([^`]+)`", row)):
        for part in message.split("…"):
            assert not part.strip("?. ") or any(part.strip("?. ") in text for text in texts()), message


def test_the_estimates_of_the_kernels_page_are_those_of_the_plan():
    page = (ROOT / "prime_kernels" / "README.md").read_text()
    table = re.findall(r"^\| ([\d.]+) ([MG])iB \| (\d+) \| (\d+)% \| (\d) \|$", page, re.M)
    assert len(table) == 4
    D, V, N = 4096, 131072, 1 << 20
    for size, unit, tokens, percent, passes in table:
        workspace = int(float(size) * (1 << (30 if unit == "G" else 20)))
        settings = {"workspace": workspace, "bytes_per_logit": 4, "copies": False, "flop_per_byte": GPU_FLOP_PER_BYTE}
        # One chunk more than fits, so that chunks are as large as they can be.
        limit = plan_one_pass(int(tokens), D, V, need_dw=False, **settings).rows
        assert limit == int(tokens)
        assert plan_one_pass(int(tokens) + 1, D, V, need_dw=False, **settings).rows < int(tokens) + 1
        assert round(100 * 8 * GPU_FLOP_PER_BYTE / (6 * limit)) == int(percent)
        assert plan_one_pass(N // 64, D, V, need_dw=True, **settings).passes == int(passes)


WRONG = {
    "a command": ["prime-train", "trian", "quickstart"],
    "a key": ["prime-train", "run", "quickstart", "--run.stepz", "3"],
    "a recipe": ["prime-train", "run", "quickstrat"],
    "an option": ["prime-train", "export", "runs/x", "--where", "here"],
    "a target": ["make", "coffee"],
    "a module": ["python", "-m", "benchmarks.nothing"],
    "a module's option": ["python", "-m", "benchmarks.report", "--nothing"],
    "a program": ["prime-trian", "run", "quickstart"],
    "a file": ["python", "examples/9_nothing.py"],
}


@pytest.mark.parametrize("command", WRONG.values(), ids=WRONG)
def test_a_command_that_would_fail_is_found(command):
    try:
        said = wrong(command)
    except Exception as error:
        said = str(error)
    assert said


def test_prose_and_code_are_told_apart():
    page = ROOT / "README.md"
    assert "import torch" not in prose(page)
    assert any("import torch" in block.text for block in blocks(page))
