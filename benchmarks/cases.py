"""What is measured, as data: ops with their cost and the test that gates them, heads, and the cases of every run.

N tokens, D hidden size, V vocabulary. One GEMM of a case is 2·N·D·V FLOP.
"""

from dataclasses import dataclass
from typing import Literal

import torch

Gemm = Literal["logits", "dhidden", "dweight"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Op:
    """One operation on a head, with the FLOPs of its floor and the test that must pass before its times mean a thing.

    The floor counts the GEMMs that the op takes with no [N, V] tensor kept. An implementation that does keep one may
    go below the floor of "logprob" and "frozen", where others compute the logits twice.
    """

    name: str
    what: str
    gemms: tuple[Gemm, ...]
    results: tuple[str, ...]  # the first one is differentiated
    trains: tuple[str, ...]  # whose gradients are part of the op
    gate: str  # pytest node


OPS = {
    op.name: op
    for op in (
        Op(name="forward", what="log-probs, no gradient", gemms=("logits",), results=("logp",), trains=(),
           gate="tests/kernels/test_logprob.py"),
        Op(name="entropy", what="log-probs and entropies, no gradient", gemms=("logits",), results=("logp", "entropy"),
           trains=(), gate="tests/kernels/test_logprob.py"),
        Op(name="logprob", what="log-prob of each token, forward and backward",
           gemms=("logits", "logits", "dhidden", "dweight"), results=("logp",), trains=("hidden", "weight"),
           gate="tests/kernels/test_logprob.py"),
        Op(name="frozen", what="the same with the head frozen", gemms=("logits", "dhidden"), results=("logp",),
           trains=("hidden",), gate="tests/kernels/test_logprob.py"),
        Op(name="ce", what="mean cross-entropy, forward and backward", gemms=("logits", "dhidden", "dweight"),
           results=("loss",), trains=("hidden", "weight"), gate="tests/kernels/test_token_loss.py"),
        Op(name="ppo", what="PPO-clip loss, forward and backward", gemms=("logits", "dhidden", "dweight"),
           results=("loss",), trains=("hidden", "weight"), gate="tests/kernels/test_ppo.py"),
        Op(name="prm", what="implicit PRM cross-entropy, forward and backward",
           gemms=("logits", "dhidden", "dweight"), results=("loss",), trains=("hidden", "weight"),
           gate="tests/kernels/test_prm.py"),
    )
}  # fmt: skip


@dataclass(frozen=True, slots=True, order=True)
class Case:
    """One op at one shape in one dtype."""

    op: str
    N: int
    D: int
    V: int
    dtype: str = "bfloat16"

    @property
    def spec(self) -> Op:
        return OPS[self.op]

    @property
    def torch_dtype(self) -> torch.dtype:
        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype

    @property
    def flops(self) -> int:
        """FLOP of the floor."""
        return len(self.spec.gemms) * 2 * self.N * self.D * self.V

    @property
    def bytes(self) -> int:
        """The least that can move: tokens and head read once, each gradient written once."""
        sizes = {"hidden": self.N * self.D, "weight": self.V * self.D}
        return (sum(sizes.values()) + sum(sizes[t] for t in self.spec.trains)) * self.torch_dtype.itemsize

    def __str__(self) -> str:
        return f"{self.op} N={self.N} D={self.D} V={self.V} {self.dtype}"


@dataclass(frozen=True, slots=True)
class Head:
    """A vocabulary projection that people train."""

    name: str
    D: int
    V: int


MAIN = Head("131072 × 4096", 4096, 131072)  # the shape of most published rows
LLAMA = Head("Llama 3 8B", 4096, 128256)
WIDE = Head("151936 × 4096", 4096, 151936)
QWEN_7B = Head("Qwen2.5 7B", 3584, 152064)
QWEN_1B = Head("Qwen2.5 1.5B", 1536, 151936)
QWEN_HALF = Head("Qwen2.5 0.5B", 896, 151936)

# In order of importance: a run that ends early has measured the first ones.
ALL_OPS = ("ppo", "logprob", "forward", "ce", "prm", "frozen", "entropy")


def at(head: Head, tokens: tuple[int, ...], ops: tuple[str, ...], dtype: str = "bfloat16") -> tuple[Case, ...]:
    return tuple(Case(op, N, head.D, head.V, dtype) for N in tokens for op in ops)


GPU_MAIN = at(MAIN, (8192,), ALL_OPS)
GPU_HEADS = (
    *at(QWEN_7B, (8192,), ("ppo", "logprob", "forward")),
    *at(QWEN_1B, (8192,), ("ppo", "logprob")),
    *at(QWEN_HALF, (8192,), ("ppo", "logprob")),
    *at(LLAMA, (8192,), ("ce", "ppo")),
    *at(WIDE, (8192,), ("ppo", "ce")),
)
GPU_TOKENS = tuple(case for op in ("ppo", "logprob", "forward") for case in at(MAIN, (32768, 2048, 16384, 4096), (op,)))

# Two cores: logits of 16 MiB, and for memory of 16 MiB to 256 MiB.
CPU_HEAD = Head("cpu", 256, 8192)
CPU_MAIN = at(CPU_HEAD, (512,), ALL_OPS, "float32")
CPU_TOKENS = at(CPU_HEAD, (128, 1024), ("ppo", "logprob"), "float32")

# Sizes for the interpreter; one case in 16 bits, which strategy "fused" wants.
DRY_HEAD = Head("dry", 128, 384)
DRY_MAIN = (*at(DRY_HEAD, (32,), ("ppo",)), *at(DRY_HEAD, (32,), ("forward", "ce"), "float32"))
DRY_TOKENS = at(DRY_HEAD, (16, 32), ("logprob",), "float32")

# Peak memory alone, against V and then N.
GPU_MEMORY = tuple(
    Case(op, N, 4096, V) for N, V in ((8192, 131072), (8192, 32768), (8192, 65536), (8192, 262144), (32768, 131072))
    for op in ("ppo", "logprob")
)  # fmt: skip
CPU_MEMORY = tuple(Case(op, 1024, 64, V, "float32") for V in (4096, 16384, 65536) for op in ("ppo", "logprob"))
DRY_MEMORY = tuple(Case("ppo", 32, 128, V, "float32") for V in (256, 384))

# In sweeps over N and V, without torch.compile: compiling anew for every shape takes the time of many others.
SWEEP_PROVIDERS = (
    "ours-chunked", "ours-fused", "ours-torch", "eager", "chunked-eager", "torch-lce", "liger-grpo", "liger-ce",
    "liger-scaled", "cce", "trl", "verl",
)  # fmt: skip

# Where our scratch memory is held against its bound: N and V grow in turn; full logits of the last take 40 GB.
GPU_SCRATCH_SHAPES = ((8192, 4096, 131072), (8192, 4096, 262144), (32768, 4096, 131072), (65536, 3584, 152064))
DRY_SCRATCH_SHAPES = ((32, 64, 512),)
