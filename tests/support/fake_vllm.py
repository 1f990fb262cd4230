"""A server with vLLM's routes and no model, and a proxy that spoils what passes through it.

As a program, with --host, --port, --served-model-name and maybe --orphan FILE, the server is a process like vLLM's:
with a child that would outlive it, in a session of its own, whose process id it writes to FILE.
"""

import argparse
import json
import os
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[2]))
from tests.support.fake_transfer import Receiver, Refused

EOS = 2
GENERATE = "/inference/v1/generate"
HANG_S = 30.0


class FakeVLLM:
    """What it holds, and what it was asked."""

    def __init__(self, receiver: Receiver | None = None) -> None:
        self.receiver = receiver or Receiver()
        self.version = "default"
        self.name = ""
        self.model_config: dict[str, Any] = {"logprobs_mode": "processed_logprobs", "max_model_len": 4096}
        self.loaded: list[str] = []
        self.asked: list[str] = []
        self.delay = 0.0
        self.lock = threading.Lock()
        self.running = self.most_running = 0

    def respond(self, method: str, path: str, body: bytes) -> tuple[int, bytes]:
        """An `Answer`."""
        try:
            return 200, json.dumps(self.answer(path.partition("?")[0], json.loads(body or b"{}"))).encode()
        except KeyError as missing:
            return 422, f"no {missing}".encode()
        except Refused as why:
            return 500, str(why).encode()

    def answer(self, path: str, body: dict) -> dict:
        with self.lock:
            self.asked.append(path)
        if path == "/v1/models":
            return {"data": [{"id": self.name}]}
        if path == "/version":
            return {"version": "0.32.0"}
        if path == "/server_info":
            return {"vllm_config": {"model_config": self.model_config, "weight_transfer_config": None}, "vllm_env": {}}
        if path == "/collective_rpc":
            self.loaded.append(body["kwargs"]["weights_path"])
            return {"results": [None]}
        if path == "/update_weight_version":
            self.version = body["new_version"]
            return {"success": True}
        if path == "/weight_info":
            return {"weight_version": self.version}
        if path == "/reset_prefix_cache":
            return {"success": True}
        if path == GENERATE:
            return self.generate(body)
        return self.receiver.answer(path, body) or {}

    def generate(self, body: dict) -> dict:
        """To each prompt its own tokens and an end of sequence, n times; as many of them as there is room for."""
        with self.lock:
            self.running += 1
            self.most_running = max(self.running, self.most_running)
        time.sleep(self.delay)
        whole = [*body["token_ids"], EOS]
        tokens = whole[: self.model_config["max_model_len"] - len(body["token_ids"])]
        choices = [
            {
                "index": i,
                "token_ids": tokens,
                "finish_reason": "stop" if tokens == whole else "length",
                "logprobs": {"content": [{"token_id": t, "logprob": -0.5} for t in tokens]},
                "weight_versions": [{"version": self.version, "start": 0, "end": len(tokens)}],
            }
            for i in reversed(range(body["sampling_params"]["n"]))
        ]
        with self.lock:
            self.running -= 1
        return {"choices": choices}


Answer = Callable[[str, str, bytes], tuple[int, bytes]]
"""(method, path, body) to (status, body)."""


def handler(answer: Answer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self.do_POST()

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("content-length") or 0))
            try:
                status, found = answer(self.command, self.path, body)
            except ConnectionAbortedError:
                self.close_connection = True
                return
            self.send_response(status)
            self.send_header("content-length", str(len(found)))
            self.end_headers()
            self.wfile.write(found)
            # Like vLLM's, which says nothing of it in its answer.
            self.close_connection = status >= 500

        def log_message(self, *_: object) -> None:
            pass

    return Handler


@contextmanager
def serving(answer: Answer) -> Iterator[str]:
    """The URL of a server that answers so."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler(answer))
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@contextmanager
def fake_vllm(receiver: Receiver | None = None) -> Iterator[tuple[str, FakeVLLM]]:
    fake = FakeVLLM(receiver)
    with serving(fake.respond) as url:
        yield url, fake


class Faults:
    """What happens to the next requests of a path, one fault a request; afterwards all is well."""

    def __init__(self) -> None:
        self.coming: dict[str, list[str]] = {}
        self.happened: list[str] = []

    def at(self, path: str, *faults: str) -> None:
        self.coming[path] = list(faults)

    def next(self, path: str) -> str | None:
        left = self.coming.get(path.partition("?")[0])
        if not left:
            return None
        # The last one stays for good where it says so.
        fault = left[0] if left[0].startswith("always ") else left.pop(0)
        self.happened.append(fault)
        return fault.removeprefix("always ")


@contextmanager
def faulty_proxy(target: str) -> Iterator[tuple[str, Faults]]:
    """A server that passes everything on to target, but for faults: "hang", "500", "truncated", "cut" (the connection),
    "stale" (a version that is not the right one)."""
    faults = Faults()

    def answer(method: str, path: str, body: bytes) -> tuple[int, bytes]:
        fault = faults.next(path)
        if fault == "hang":
            time.sleep(HANG_S)
        if fault in ("hang", "cut"):
            raise ConnectionAbortedError
        if fault == "500":
            return 500, b"out of luck"
        request = urllib.request.Request(target + path, data=body or None, method=method)
        request.add_header("content-type", "application/json")
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request) as found:
            whole = found.read()
        if fault == "truncated":
            return 200, whole[: len(whole) // 2]
        if fault == "stale":
            return 200, _with_version(json.loads(whole), "stale")
        return 200, whole

    with serving(answer) as url:
        yield url, faults


def _with_version(answer: dict, version: str) -> bytes:
    for choice in answer.get("choices", ()):
        choice["weight_versions"] = [{"version": version, "start": 0, "end": len(choice["token_ids"])}]
    if "weight_version" in answer:
        answer["weight_version"] = version
    return json.dumps(answer).encode()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--orphan")
    parser.add_argument("--host")
    parser.add_argument("--port", type=int)
    parser.add_argument("--served-model-name")
    options, _ = parser.parse_known_args()
    fake = FakeVLLM(Receiver(os.environ.get("VLLM_NCCL_SO_PATH")))
    fake.name = options.served_model_name
    server = ThreadingHTTPServer((options.host, options.port), handler(fake.respond))
    if options.orphan:
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
        with open(options.orphan, "a") as file:
            file.write(f"{child.pid}\n")
    server.serve_forever()


if __name__ == "__main__":
    main()
