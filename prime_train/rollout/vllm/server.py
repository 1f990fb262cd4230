"""A vLLM server of the run's own: started on 127.0.0.1, waited for, looked after, and ended with its whole tree."""

import os
import re
import secrets
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import httpx2

from .errors import ServerDied, ServerError

GUARD = Path(__file__).with_name("guard.py")
TORCHRUN = r"TORCHELASTIC_.*|(LOCAL_|GROUP_|ROLE_)?(RANK|WORLD_SIZE)|ROLE_NAME|MASTER_(ADDR|PORT)"
"""Names of what torchrun tells its workers."""
ENVIRONMENT = {"VLLM_SERVER_DEV_MODE": "1", "VLLM_NO_USAGE_STATS": "1"}
"""The first opens the routes that refresh weights."""
OPTIONS = ("--logprobs-mode", "processed_logprobs", "--generation-config", "vllm", "--enable-scale-out")
"""Log-probs of what was sampled from, no sampling defaults of the model, and the route of token ids."""
PORTS_TRIED = 5
POLL_S = 0.2
TAIL = 15
"""Lines of the log that an error shows."""


def command_line(server: str, model: str, *, dtype: str, max_model_len: int, options: Sequence[str] = ()) -> list[str]:
    """What starts a server that the trainer can talk to.

    Args:
        server: the Python of an environment that has vLLM, and options of its server, which come last and so win.
    """
    python, *own = shlex.split(server)
    return [
        python, "-m", "vllm.entrypoints.openai.api_server", "--model", model, "--dtype", dtype, "--max-model-len",
        str(max_model_len), *OPTIONS, *options, *own,
    ]  # fmt: skip


class ServerProcess:
    """Starts `command` with `--host`, `--port` and `--served-model-name` after it.

    Args:
        log: file that gets its output, after what is there.
        deadline: seconds until it must answer.

    Raises:
        ServerError: it ended or did not answer in time, with the end of its log.
    """

    def __init__(
        self, command: Sequence[str], *, log: Path, deadline: float, environment: Mapping[str, str] | None = None
    ) -> None:
        self.command, self.log, self.deadline = list(command), log, deadline
        # torchrun's word to its workers would have the server's own processes look for torchrun's store.
        inherited = {name: value for name, value in os.environ.items() if not re.fullmatch(TORCHRUN, name)}
        self.environment = {**inherited, **ENVIRONMENT, **(environment or {})}
        self.url = ""
        # What the server calls its model: whoever else answers at its port is not taken for it.
        self.name = f"prime-{secrets.token_hex(8)}"
        self._guard: subprocess.Popen[bytes] | None = None

    def start(self, waiting: Callable[[], None] = lambda: None) -> None:
        """Returns when the server answers. A port that somebody else took meanwhile is exchanged for another.

        Args:
            waiting: called every so often; what it raises ends the server.
        """
        self.log.parent.mkdir(parents=True, exist_ok=True)
        end = time.monotonic() + self.deadline
        for _ in range(PORTS_TRIED):
            at = self.log.stat().st_size if self.log.exists() else 0
            try:
                self._start_once(free_port(), end, waiting)
                return
            except ServerDied:
                if b"ddress already in use" not in self.log.read_bytes()[at:]:
                    raise
        raise ServerDied(f"{PORTS_TRIED} ports in turn were taken by others before the server had them")

    def check(self) -> None:
        """Raises ServerDied if the server has ended."""
        if self._guard is None or self._guard.poll() is not None:
            status = "was not started" if self._guard is None else f"ended with status {self._guard.returncode}"
            raise ServerDied(f"the vLLM server at {self.url} {status}; {self._end_of_log()}")

    def stop(self) -> None:
        """Ends the server and every process it started, and waits until they are gone."""
        if self._guard is None:
            return
        assert self._guard.stdin is not None
        self._guard.stdin.close()
        self._guard.wait()
        self._guard = None

    def _start_once(self, port: int, end: float, waiting: Callable[[], None]) -> None:
        self.url = f"http://127.0.0.1:{port}"
        where = ["--host", "127.0.0.1", "--port", str(port), "--served-model-name", self.name]
        command = [sys.executable, "-I", str(GUARD), *self.command, *where]
        with self.log.open("ab") as log:
            # In a session of its own: Ctrl-C at the terminal is for the trainer, which still needs its server then.
            self._guard = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=log, stderr=subprocess.STDOUT, env=self.environment,
                start_new_session=True,
            )  # fmt: skip
        try:
            while not self._answers():
                self.check()
                if time.monotonic() > end:
                    raise ServerError(
                        f"the vLLM server at {self.url} was not ready after {self.deadline:.3g} s; {self._end_of_log()}"
                    )
                waiting()
                time.sleep(POLL_S)
        except BaseException:
            self.stop()
            raise

    def _answers(self) -> bool:
        try:
            answer = httpx2.get(f"{self.url}/v1/models", timeout=5.0, trust_env=False)
            return answer.status_code == 200 and answer.json()["data"][0]["id"] == self.name
        except (httpx2.HTTPError, ValueError, LookupError, TypeError):
            return False

    def _end_of_log(self) -> str:
        lines = self.log.read_text(errors="replace").splitlines()[-TAIL:]
        return f"the end of {self.log}:\n" + "\n".join(lines)


def free_port() -> int:
    """A port of 127.0.0.1 that nobody has at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
