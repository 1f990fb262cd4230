"""Imports go down: from the programs to the rooms, from each room to those that it may know, and never in a ring."""

import ast
import re
import shutil
import subprocess
import sys

import pytest

from tests.support.imports import arrows, cycle
from tests.support.paths import ROOT

BELOW = {
    "prime_kernels": (),
    "prime_train": ("prime_kernels",),
    "benchmarks": ("prime_kernels", "prime_train"),
    "examples": ("prime_kernels", "prime_train"),
    "tests": ("prime_kernels", "prime_train", "benchmarks"),
}
"""Of each package, the others that it may import."""
PACKAGES = tuple(BELOW)
SHIPPED = PACKAGES[:3]
MAY_IMPORT = {
    "records": set(),
    "config": set(),
    "verify": set(),
    "data": {"records", "config", "verify"},
    "models": {"records"},
    "algorithm": {"records", "config", "models"},
    "run": {"config", "data", "models"},
    "plan": {"records", "config", "data", "models", "run"},
    "rollout": {"records", "config", "verify", "data", "models", "run", "plan"},
    "evaluation": {"records", "config", "rollout"},
    "show": {"records", "models", "algorithm", "run", "rollout"},
}
"""Of each room, from the lowest up, the rooms whose modules its own may import."""
PROGRAMS = {"prime", "sft", "checks", "doctor", "reference", "cli", "__main__"}
"""Above all rooms: they may import every one, and no room imports them."""


def wrong_arrows(root):
    """Every import that the table does not allow, as `module:line imports module`."""
    found = []
    for module, imported in arrows(root, *PACKAGES).items():
        for target, line in imported.items():
            if not allowed(module, target):
                found.append(f"{module}:{line} imports {target}")
    return found


def allowed(module, target):
    package, other = module.split(".")[0], target.split(".")[0]
    if package != other:
        return other in BELOW[package]
    if package != "prime_train" or target == package:
        return True
    if module == package:
        return False
    room, wanted = module.split(".")[1], target.split(".")[1]
    return room in PROGRAMS or room == wanted or wanted in MAY_IMPORT.get(room, ())


def test_every_import_is_one_that_the_table_allows():
    assert wrong_arrows(ROOT) == []


def test_no_modules_import_each_other_in_a_ring():
    assert cycle(arrows(ROOT, *PACKAGES)) == []


def test_the_table_points_down():
    rooms = list(MAY_IMPORT)
    for at, room in enumerate(rooms):
        assert MAY_IMPORT[room] <= set(rooms[:at]), room


def test_every_room_is_in_the_table_and_says_what_it_is_for_and_what_it_may_import():
    package = ROOT / "prime_train"
    places = [path.stem for path in package.iterdir() if path.suffix == ".py" or any(path.rglob("*.py"))]
    assert sorted(places) == sorted(["__init__", *MAY_IMPORT, *PROGRAMS])
    for room in set(MAY_IMPORT) - {"records"}:
        said = ast.get_docstring(ast.parse((package / room / "__init__.py").read_text())) or ""
        assert said.count("\n\n") >= 2, f"{room}: a line, a paragraph, and what it may import"
        listed = re.search(r"^May import: ([\w, ]+)\.$", said, re.M)
        assert listed, room
        assert set(listed[1].split(", ")) - {"nothing"} == MAY_IMPORT[room], room


def test_every_folder_of_modules_says_what_it_is_for():
    for init in (ROOT / "prime_train").rglob("__init__.py"):
        if len(list(init.parent.glob("*.py"))) > 1:
            assert ast.get_docstring(ast.parse(init.read_text())), init


def test_the_table_allows_nothing_that_no_room_does():
    used = {room: set() for room in MAY_IMPORT}
    for module, imported in arrows(ROOT, "prime_train").items():
        for target in imported:
            if (room := module.split(".")[1:2]) and room[0] in used:
                used[room[0]] |= set(target.split(".")[1:2]) - set(room)
    assert used == MAY_IMPORT


PLANTED = {
    "a room above": ("prime_train/models/packing.py", "from ..rollout.collect import Collected"),
    "inside a function": ("prime_train/data/prompts.py", "def f():\n    from ..models import optim"),
    "for types alone": (
        "prime_train/config/keys.py",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from ..run.setup import Models",
    ),
    "a program": ("prime_train/rollout/collect.py", "from prime_train import prime"),
    "a whole room": ("prime_train/verify/math.py", "import prime_train.data.prompts"),
    "records that import": ("prime_train/records.py", "from .config.keys import Config"),
    "kernels that know the trainer": ("prime_kernels/plan.py", "import prime_train.plan.sizes"),
    "the trainer that knows the benchmarks": ("prime_train/prime.py", "from benchmarks import cases"),
    "the trainer's own __init__": ("prime_train/__init__.py", "from .run import setup"),
    "by its name, to importlib": ("prime_train/data/prompts.py", 'A = "prime_train.models.optim"'),
    "by its name, behind a package": ("prime_train/data/prompts.py", "prime_train.models.optim"),
    "tests": ("prime_train/data/prompts.py", "from tests import tiny"),
    "a room that is not in the table": ("prime_train/attic/old.py", "from ..models import optim"),
}


@pytest.mark.parametrize(("path", "planted"), PLANTED.values(), ids=PLANTED)
def test_a_planted_wrong_import_is_found(tmp_path, path, planted):
    for package in SHIPPED:
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__", "results"))
    file = tmp_path / path
    file.parent.mkdir(exist_ok=True)
    file.write_text((file.read_text() if file.exists() else "") + "\n" + planted + "\n")
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "tiny.py").touch()
    module = path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    assert {found.partition(":")[0] for found in wrong_arrows(tmp_path)} == {module}


@pytest.mark.parametrize(
    ("path", "planted"),
    [
        ("prime_train/plan/records.py", "def late():\n    from .make import make_plan"),
        ("benchmarks/records.py", "from benchmarks import plots"),
        ("prime_kernels/tiles.py", "from .sweep import sweep_forward"),
    ],
)
def test_a_planted_ring_is_found(tmp_path, path, planted):
    package = path.split("/")[0]
    shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__", "results"))
    file = tmp_path / path
    file.write_text(f"{file.read_text()}\n{planted}\n")
    ring = cycle(arrows(tmp_path, package))
    assert ring[0] == ring[-1]
    assert path.removesuffix(".py").replace("/", ".") in ring


def test_reading_a_configuration_does_not_wait_for_torch():
    code = "import prime_train.config.settings, sys; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"
