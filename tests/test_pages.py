"""What the README shows is what happens."""

import re
import subprocess
import sys

import pytest

from prime_kernels.plan import GPU_FLOP_PER_BYTE, plan_one_pass
from tests.support.paths import ROOT

README = (ROOT / "README.md").read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```\n+prints\n+```\n(.*?)```", README, re.S)


def test_readme_has_examples_with_output():
    assert EXAMPLES


@pytest.mark.parametrize(("code", "printed"), EXAMPLES)
def test_readme_example_prints_what_it_says(code, printed):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout == printed


def test_make_targets_named_in_the_readme_exist():
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"`?make ([a-z-]+)`?", README):
        assert re.search(rf"^{target}:", makefile, re.M), target


def test_readme_estimates_are_those_of_the_plan():
    table = re.findall(r"^\| ([\d.]+) ([MG])iB \| (\d+) \| (\d+)% \| (\d) \|$", README, re.M)
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
