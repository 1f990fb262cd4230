"""The table of metrics is what the code writes: no more, no less, under the same names."""

import ast
import math
import re
from collections.abc import Iterator
from typing import get_args

import pytest

from prime_train import sft
from prime_train.algorithm import mismatch
from prime_train.config.keys import Config
from prime_train.plan.flops import Tokens, stage_flops
from prime_train.plan.sizes import sizes_of
from prime_train.show import measures, metrics
from prime_train.verify.records import Status
from tests.support.paths import ROOT
from tests.support.tiny import model

PACKAGE = ROOT / "prime_train"
TABLE = {metric.name: metric for group in metrics.METRICS for metric in group.metrics}
NAMES = {name for metric in TABLE.values() for name in metric.names}
"""All that may stand in a record, beside `step`."""


def tree(path: str) -> ast.Module:
    return ast.parse((PACKAGE / path).read_text())


def name(node: ast.AST | None) -> str | None:
    """The metric that an expression names, `time/*` for an f-string; None for anything else."""
    parts = node.values if isinstance(node, ast.JoinedStr) else [node]
    text = "".join(str(part.value) if isinstance(part, ast.Constant) else "*" for part in parts)
    return text if re.fullmatch(r"[a-z]+/[a-z_*]+", text) else None


def made(code: ast.AST) -> set[str]:
    """Metrics that are keys of dictionaries, or assigned to one."""

    def keys() -> Iterator[ast.AST | None]:
        for node in ast.walk(code):
            if isinstance(node, ast.Dict):
                yield from node.keys
            elif isinstance(node, ast.DictComp):
                yield node.key
            elif isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Store):
                yield node.slice

    return {found for key in keys() if (found := name(key))}


def looked_up(code: ast.AST) -> set[str]:
    """Metrics that are read from dictionaries, or asked whether they are in one."""

    def keys() -> Iterator[ast.AST]:
        for node in ast.walk(code):
            if isinstance(node, ast.Subscript):
                yield node.slice
            elif isinstance(node, ast.Compare):
                yield node.left
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "get":
                yield from node.args[:1]

    return {found for key in keys() if (found := name(key))}


def in_code(of: str) -> str:
    """A name of the table as the code has it."""
    return metrics.PLACEHOLDER.sub("*", of)


MODULES = [path for path in sorted(PACKAGE.rglob("*.py")) if path != PACKAGE / "show" / "metrics.py"]
READERS = [PACKAGE / "show" / "report.py"]
"""Whose dictionaries have metrics for keys that others made."""


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_every_metric_that_a_module_names_is_in_the_table(path):
    code = ast.parse(path.read_text())
    assert made(code) | looked_up(code) <= {in_code(name) for name in TABLE} | {in_code(name) for name in NAMES}


def test_every_metric_of_the_table_is_made_by_the_code():
    everywhere = set().union(*(made(ast.parse(path.read_text())) for path in MODULES if path not in READERS))
    assert {name for name in TABLE if in_code(name) not in everywhere} == set()


def test_metrics_are_read_from_code_in_every_form():
    code = ast.parse(
        "f = {'a/one': 1, **{f'a/{x}_gib': x for x in y}}\nf['a/two'] = 2\n"
        "print(f['b/one'], f.get('b/two'), 'b/three' in f, 'b/none', {'c': 1, 'runs/': 2})\n"
    )
    assert made(code) == {"a/one", "a/*_gib", "a/two"}
    assert looked_up(code) == {"a/two", "b/one", "b/two", "b/three"}


def test_a_group_has_the_metrics_with_its_prefix_and_no_name_stands_twice():
    for group in metrics.METRICS:
        assert all(metric.name.startswith(f"{group.prefix}/") for metric in group.metrics)
        assert group.metrics
    assert len(NAMES) == sum(len(metric.names) for metric in TABLE.values())
    assert len(NAMES) > len(TABLE) == sum(len(group.metrics) for group in metrics.METRICS)


def test_a_family_is_its_placeholder_and_the_values_of_it():
    for metric in TABLE.values():
        assert bool(metric.values) == bool(metric.placeholder), metric.name
    assert TABLE["memory/STAGE_gib"].names[0] == "memory/rollout_gib"
    assert TABLE["memory/STAGE_gib"].placeholder == "STAGE"


def test_stages_are_those_that_the_programs_time():
    calls = [node for path in ("prime.py", "sft.py") for node in ast.walk(tree(path)) if isinstance(node, ast.Call)]
    timed = {call.args[0].value for call in calls if isinstance(call.func, ast.Name) and call.func.id == "clock"}
    assert set(metrics.STAGES) == timed
    for family in ("time/STAGE", "memory/STAGE_gib"):
        assert TABLE[family].values == metrics.STAGES


def test_stages_with_mfu_are_those_whose_flops_are_counted():
    counted = stage_flops(
        Config(), Tokens(all=9, responses=4, pairs=81), policy=sizes_of(model(shape="16x1x2").transformer.config)
    )
    assert set(TABLE["throughput/mfu_STAGE"].values) == {*counted, "sft"}


def test_reasons_are_those_for_which_prompts_are_dropped():
    reasons = set()
    for node in ast.walk(tree("rollout/collect.py")):
        if isinstance(node, ast.FunctionDef) and node.name == "why_dropped":
            reasons |= {n.value.value for n in ast.walk(node) if isinstance(n, ast.Return)} - {None}
        elif isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant) and node.targets[0].id == "reason":
            reasons.add(node.value.value)
    assert {reason.replace(" ", "_") for reason in reasons} == set(TABLE["filter/REASON"].values)


def test_statuses_are_the_verifiers_without_the_one_that_ends_a_run():
    assert set(TABLE["verify/STATUS"].values) == set(get_args(Status)) - {"refused"}


@pytest.mark.parametrize(
    ("name", "number"),
    [
        ("sampler/ratio_mean", f"Above {mismatch.ALARMING}"),
        ("reward/rare_wrong", f"p below {math.exp(measures.RARE):.2f}"),
        ("sft/grad_norm", f"to {sft.GRAD_CLIP:g}"),
    ],
)
def test_numbers_in_the_table_are_those_of_the_code(name, number):
    assert number in TABLE[name].meaning
