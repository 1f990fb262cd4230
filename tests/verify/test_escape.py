"""Programs that try to get out, to stay, to take everything, or to score without an answer. None may score."""

import json
import os
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from prime_train.verify.code import score_code
from tests.support.verify_data import sandbox_or_skip

SECRET = "42-secret-42"
REFERENCE = json.dumps({"inputs": ["21\n"], "outputs": [SECRET]})
CALL = json.dumps({"fn_name": "f", "inputs": [[21]], "outputs": [SECRET]})


def attempt(code: str, reference: str = REFERENCE) -> float:
    """The score of a program, after which an ordinary one must still pass in the same sandbox."""
    sandbox = sandbox_or_skip()
    score = score_code(sandbox, f"```python\n{code}\n```", reference, 5.0)[0]
    assert score_code(sandbox, f"```python\nprint({SECRET!r})\n```", REFERENCE, 10.0) == (1.0, "ok", "")
    return score


def tell(expression: str) -> str:
    """A program that would score, if what it reads were there to be read."""
    return f"try:\n    found = {expression}\nexcept BaseException:\n    found = ''\nprint(found.strip())"


@pytest.fixture
def planted(tmp_path: Path) -> Iterator[Path]:
    """A file of this user's, readable by everybody."""
    path = Path(os.environ.get("HOME", str(tmp_path))) / f".prime-planted-{os.getpid()}"
    try:
        path.write_text(SECRET)
    except OSError:
        path = tmp_path / "planted"
        path.write_text(SECRET)
    path.chmod(0o644)
    yield path
    path.unlink()


def test_a_planted_file_cannot_be_read(planted):
    assert attempt(tell(f"open({str(planted)!r}).read()")) == 0.0
    assert attempt(tell(f"open('/tmp/../' + {str(planted)!r}).read()")) == 0.0


def test_the_hosts_passwd_cannot_be_read():
    reference = json.dumps({"inputs": [""], "outputs": [Path("/etc/passwd").read_text()]})
    assert attempt(tell("open('/etc/passwd').read()"), reference) == 0.0
    assert attempt(tell("open('/proc/1/root/etc/passwd').read()"), reference) == 0.0


def test_the_callers_environment_cannot_be_read(monkeypatch):
    monkeypatch.setenv("PRIME_PLANTED", SECRET)
    assert attempt(tell("open('/proc/1/environ').read()")) == 0.0
    assert attempt(tell("__import__('os').environ['PRIME_PLANTED']")) == 0.0


def test_files_outside_tmp_cannot_be_written():
    places = [
        "/x",
        "/usr/x",
        "/usr/lib/x",
        "/etc/x",
        "/dev/x",
        "/dev/shm/x",
        "/runner.py",
        "/root/x",
        "/home/x",
        "/var/tmp/x",
    ]
    code = "done = []\nfor path in PLACES:\n    try:\n        open(path, 'a').write('x')\n        done.append(path)\n    except OSError:\n        pass\nprint(done or 'none')"
    reference = json.dumps({"inputs": [""], "outputs": ["none"]})
    assert attempt(code.replace("PLACES", repr(places)), reference) == 1.0
    assert attempt(f"open('/tmp/escaped-{os.getpid()}', 'w').write('x')") == 0.0
    assert not os.path.exists(f"/tmp/escaped-{os.getpid()}")


def test_a_listening_port_cannot_be_reached():
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.2)
        port = server.getsockname()[1]
        assert (
            attempt(f"import socket\nsocket.create_connection(('127.0.0.1', {port}), 1)\nprint({SECRET[:4]!r})") == 0.0
        )
        with pytest.raises(TimeoutError):
            server.accept()


def test_processes_outside_cannot_be_signalled():
    bystander = subprocess.Popen(["sleep", "60"])
    try:
        pids = [bystander.pid, os.getpid(), os.getppid()]
        code = f"import os\nfor pid in {pids} + [os.getppid(), 1, 2, -1]:\n    try:\n        os.kill(pid, 9)\n    except OSError:\n        pass"
        assert attempt(code) == 0.0
        assert bystander.poll() is None
    finally:
        bystander.kill()
        bystander.wait()


def test_a_fork_bomb_is_stopped_and_leaves_nothing():
    before = len([p for p in os.listdir("/proc") if p.isdigit()])
    assert attempt("import os\nwhile True:\n    try:\n        os.fork()\n    except OSError:\n        pass") == 0.0
    assert len([p for p in os.listdir("/proc") if p.isdigit()]) < before + 20


def test_a_fork_bomb_cannot_have_more_processes_than_allowed():
    code = (
        "import os, time\nmade = 0\ntry:\n    for _ in range(200):\n        if os.fork() == 0:\n            time.sleep(1)\n            os._exit(0)\n"
        "        made += 1\nexcept OSError:\n    pass\nprint(made < 20)"
    )
    assert attempt(code, json.dumps({"inputs": [""], "outputs": ["True"]})) == 1.0


@pytest.mark.parametrize(
    "code",
    [
        "x = bytearray(10 << 30)",
        "x = []\nwhile True: x.append('y' * 10_000_000)",
        "s = 'x'\nwhile True: s += s",
        "import os\nfor _ in range(8): os.fork()\nx = bytearray(200 << 20)\nfor i in range(0, len(x), 4096): x[i] = 1\nimport time; time.sleep(9)",
        "import zlib\nd = zlib.compress(bytes(100 << 20)) * 50\nx = [zlib.decompress(d) for _ in range(100)]",
        "open('/tmp/x', 'wb').truncate(10 << 30)\nprint(open('/tmp/x', 'rb').read(1))",
        "i = 0\nwhile True:\n    i += 1\n    open(f'/tmp/{i}', 'wb').write(bytes(1 << 20))",
    ],
)
def test_taking_all_memory_fails(code):
    assert attempt(code) == 0.0


@pytest.mark.parametrize(
    "code",
    [
        "while True: pass",
        "import re; re.match('(a+)+$', 'a' * 64 + 'b')",
        "sum(iter(int, 1))",
        "print(9 ** 9 ** 9)",
        "import signal\nfor s in set(signal.valid_signals()) - {9, 19}: signal.signal(s, signal.SIG_IGN)\nwhile True: pass",
        "import threading\nt = threading.Thread(target=lambda: [0 for _ in iter(int, 1)]); t.start(); t.join()",
    ],
)
def test_what_never_ends_is_ended(code):
    start = time.monotonic()
    assert attempt(code) == 0.0
    assert time.monotonic() - start < 9


@pytest.mark.parametrize(
    "code",
    [
        "while True: print('x' * 100000)",
        "import os\nwhile True: os.write(1, b'x' * 100000)",
        "import os\nwhile True: os.write(2, b'x' * 100000)",
        "import sys\nwhile True: sys.stderr.write('x' * 1000)",
    ],
)
def test_endless_output_is_capped(code):
    assert attempt(code) == 0.0


def test_a_daemonised_child_does_not_outlive_the_run():
    mark = f"prime-daemon-{os.getpid()}"
    code = f"import os, sys, time\nif os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0:\n        for fd in range(64):\n            try: os.close(fd)\n            except OSError: pass\n        os.execv(sys.executable, [sys.executable, '-S', '-c', 'import time; time.sleep(60)', '{mark}'])\n"
    assert attempt(code) == 0.0
    time.sleep(0.2)
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            assert mark.encode() not in Path(f"/proc/{pid}/cmdline").read_bytes()
        except OSError:
            continue


def test_posix_system_finds_no_program(tmp_path):
    assert attempt("import posix\nprint(posix.system('cat /etc/passwd; touch /tmp/x; echo x'))") == 0.0
    assert attempt("import subprocess\nprint(subprocess.run(['/bin/sh', '-c', 'id'], capture_output=True))") == 0.0


@pytest.mark.parametrize(
    "call",
    [
        "libc.mount(b'none', b'/tmp', b'tmpfs', 0, None)",
        "libc.unshare(0x10000000)",
        "libc.setuid(0)",
        "libc.ptrace(16, os.getppid(), 0, 0)",
        "libc.chroot(b'/tmp')",
        "libc.shmget(0, 1 << 20, 0o1600)",
        "libc.syscall(319, b'x', 0)",
        "libc.syscall(425, 8, 0)",
        "libc.socket(16, 3, 0)",
        "libc.socket(2, 1, 0)",
        "libc.keyctl(0)",
        "libc.clone(0, 0, 0x10000000, 0)",
        "libc.prctl(22, 0, 0)",
        "libc.umount2(b'/usr', 2)",
    ],
)
def test_system_calls_through_ctypes_are_denied(call):
    code = f"import ctypes, os\nlibc = ctypes.CDLL(None, use_errno=True)\ntry:\n    r = {call}\nexcept AttributeError:\n    r = -1\nprint('denied' if r < 0 else 'done')"
    assert attempt(code, json.dumps({"inputs": [""], "outputs": ["denied"]})) == 1.0


@pytest.mark.parametrize(
    "code",
    [
        "print('all tests passed')",
        "import os; os._exit(0)",
        "import sys; sys.exit(0)",
        "import sys; sys.stdout.close()",
        "import os; os.close(1)",
        "import os\nos.closerange(0, 4096)\nos._exit(0)",
        "import os\nfor fd in range(4096):\n    try: os.write(fd, b'{\"outcome\": \"ended\", \"seconds\": 0, \"size\": 12}\\n42-secret-42')\n    except OSError: pass",
        "import sys\nfor m in list(sys.modules.values()):\n    for n in ('same_output', 'same_value', 'passed', 'wait', 'run_test', 'main', '_exit'):\n        if hasattr(m, n): setattr(m, n, lambda *a, **k: True)",
        "class A(str):\n    def __eq__(self, other): return True\nprint(A('x'))",
        "import os\nfor p in ('/tmp/result', '/tmp/results.json', '/runner.py', '/tmp/passed'):\n    try: open(p, 'w').write('{\"outcome\": \"ended\"}')\n    except OSError: pass",
        "import os\nfor p in ('/tmp/result', '/tmp/stdout', '/tmp/out'):\n    os.symlink('/etc/passwd', p)",
        "import os\nos.rename('/tmp', '/tmp2')",
        "import os\nos.rmdir('/tmp'); os.symlink('/', '/tmp')",
        "import sys\nsys.setrecursionlimit(10**9)\ndef f(n): return f(n + 1)\nf(0)",
        "import sys, threading\nsys.setrecursionlimit(10**9)\nthreading.stack_size(200 << 20)\ndef f(): f()\nt = threading.Thread(target=f); t.start(); t.join()",
        "exec(('(' * 5000) + (')' * 5000))",
        "import ctypes; ctypes.string_at(0)",
        "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)",
        "import os, signal\nos.kill(os.getppid(), signal.SIGKILL)",
        "import os, signal\nos.kill(os.getppid(), signal.SIGSTOP)\nos.kill(0, signal.SIGSTOP)",
        "import atexit, os\natexit.register(lambda: os.write(1, b'all tests passed'))",
        "import gc\nfor o in gc.get_objects():\n    if isinstance(o, dict) and 'outputs' in o: print(o['outputs'][0])",
        "import sys\nf = sys._getframe()\nwhile f:\n    print(f.f_locals.get('expected', ''))\n    f = f.f_back",
        "import json\njson.dumps = lambda *a, **k: '\"42-secret-42\"'",
    ],
)  # fmt: skip
def test_tricks_on_the_result_do_not_score(code):
    assert attempt(code) == 0.0


@pytest.mark.parametrize(
    "body",
    [
        "class A(str):\n        def __eq__(self, other): return True\n    return A('x')",
        "class A:\n        def __eq__(self, other): return True\n        def tolist(self): return ['all tests passed']\n    return A()",
        "import os; os._exit(0)",
        "import os\n    os.write(3, b'[]'); os._exit(0)",
        "import os\n    os.close(3)",
        "import sys\n    sys.exit(0)",
        "import json\n    json.dumps = lambda *a, **k: 'true'",
        "x = []\n    x.append(x)\n    return x",
        "x = []\n    for _ in range(100000): x = [x]\n    return x",
        "return 'a' * (1 << 24)",
        "return float('nan')",
    ],
)
def test_tricks_on_the_returned_value_do_not_score(body):
    assert attempt(f"def f(n):\n    {body}", CALL) == 0.0
