"""What stands in for a GPU between a trainer and servers that are both on the CPU."""

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from tests.support.standin.prime_standin import UUID

HERE = Path(__file__).parent


@contextmanager
def standin_nccl() -> Iterator[tuple[str, Path]]:
    """The path of a libnccl that carries bytes in files, and the folder of these, whose name is short enough."""
    folder = Path(tempfile.mkdtemp(prefix="nccl-", dir="/tmp"))
    library = folder / "libnccl.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", library, HERE / "nccl.c"], check=True)
    before = os.environ.get("STANDIN_NCCL")
    os.environ["STANDIN_NCCL"] = str(folder)
    try:
        yield str(library), folder
    finally:
        os.environ.pop("STANDIN_NCCL")
        if before is not None:
            os.environ["STANDIN_NCCL"] = before
        shutil.rmtree(folder)


def vllm_environment(directory: Path, library: str) -> dict[str, str]:
    """With it vLLM loads the plugin, from a directory as installing would leave it, and the library."""
    shutil.copy(HERE / "prime_standin.py", directory)
    info = directory / "prime_standin-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: prime-standin\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[vllm.general_plugins]\nstandin = prime_standin:register\n")
    return {"PYTHONPATH": str(directory), "VLLM_NCCL_SO_PATH": library}


def file_buffers(monkeypatch, directory: Path) -> None:
    """The trainer's side of CUDA IPC with a file for the GPU's memory."""
    from prime_train.rollout.vllm import ipc

    names: dict[int, str] = {}

    def allocate(size: int, device: torch.device) -> torch.Tensor:
        name = directory / f"buffer-{len(names)}"
        name.write_bytes(bytes(size))
        buffer = torch.from_file(str(name), shared=True, size=size, dtype=torch.uint8)
        names[buffer.data_ptr()] = str(name)
        return buffer

    def export(buffer: torch.Tensor) -> dict[str, tuple]:
        handle = names[buffer.data_ptr()].encode()
        storage = torch.UntypedStorage
        return {UUID: (torch.Tensor, buffer.shape, (1,), 0, storage, buffer.dtype, 0, handle, len(buffer), 0, False,
                       b"", 0, b"", False)}  # fmt: skip

    monkeypatch.setattr(ipc, "allocate", allocate)
    monkeypatch.setattr(ipc, "export", export)
