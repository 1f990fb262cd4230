"""A plugin of vLLM's that lets its own weight transfer run on a CPU; vLLM loads it into each of its processes.

Replaced is what asks PyTorch for a GPU: devices, streams, a GPU's UUID and the opening of its memory, which is a file
here. The NCCL library that vLLM loads is nccl.c, by VLLM_NCCL_SO_PATH. All else is vLLM's code.
"""

import contextlib
from types import SimpleNamespace

UUID = "GPU-of-files"


def register():
    import torch
    import torch.multiprocessing.reductions as reductions
    from vllm.distributed.weight_transfer import packed_tensor
    from vllm.utils import torch_utils

    torch.accelerator.current_device_index = lambda: torch.device("cpu")  # type: ignore[return-value]
    torch.accelerator.synchronize = lambda *_: None
    torch.cuda.stream = contextlib.nullcontext
    torch.cuda.current_stream = lambda *_: torch_utils.current_stream()
    torch.cuda.get_device_properties = lambda _: SimpleNamespace(uuid=UUID)  # type: ignore[misc]
    torch_utils._StreamPlaceholder.cuda_stream = 0
    packed_tensor._get_streams = lambda _, count: tuple(torch_utils._StreamPlaceholder() for _ in range(count))
    reductions.rebuild_cuda_tensor = opened


def opened(kind, size, stride, offset, storage, dtype, device, handle, *counts):
    """What `rebuild_cuda_tensor` is given, with a file's name for the memory's handle."""
    import torch

    assert (kind, tuple(stride), offset, dtype) == (torch.Tensor, (1,), 0, torch.uint8)
    assert len(counts) == 7
    return torch.from_file(handle.decode(), shared=True, size=size[0], dtype=torch.uint8)
