"""Figures of a step, from the records that its stages left: flat dictionaries of numbers, one a stage.

What each of them says is in `metrics`.
"""

import contextlib
import re
import resource
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from ..algorithm.advantages import Advantages
from ..algorithm.mismatch import Mismatch
from ..algorithm.policy import PolicyUpdate
from ..algorithm.prm import PRMUpdate, pairwise_accuracy, sequence_sums
from ..models.distributed import ALONE, World
from ..records import Batch, Group, ProcessRewards, Scores
from ..rollout.collect import Collected

RARE = -3.0
"""Log-prob under the reference (p = 0.05) below which a token counts as rare."""

NEARLY = 0.9
"""Of the patience: when a stage's name is told, since after all of it NCCL ends the process without a word of ours."""

Figures = dict[str, float]


def of_rollouts(collected: Collected) -> Figures:
    """How the prompts fared, before the filter and after it."""
    kept = collected.groups
    return {
        "accuracy/before_filter": collected.accuracy,
        "accuracy/after_filter": sum(group.accuracy for group in kept) / max(1, len(kept)),
        "filter/seen": collected.seen,
        "filter/kept": len(kept),
        **{f"filter/{reason.replace(' ', '_')}": count for reason, count in collected.dropped.items()},
        "response/truncated": collected.truncated,
        **{f"verify/{status}": count for status, count in collected.verdicts.items()},
    }


def of_batch(batch: Batch, scores: Scores) -> Figures:
    """Length and entropy."""
    return {
        "response/length": float(batch.sequences.cu_responses.diff().float().mean()),
        "policy/entropy": float(scores.entropy.mean()),
    }


def of_mismatch(mismatch: Mismatch) -> Figures:
    """How far the sampler's log-probs are from the trainer's."""
    return {
        "sampler/kl": mismatch.kl,
        "sampler/ratio_mean": mismatch.ratio_mean,
        "sampler/ratio_max": mismatch.ratio_max,
        "sampler/clipped": mismatch.clipped,
    }


def of_prm(beta: float, batch: Batch, reference: Tensor, rewards: ProcessRewards, update: PRMUpdate | None) -> Figures:
    """Whether the PRM tells right from wrong, as its rewards were taken, and where its rewards lie."""
    cu, outcomes = batch.sequences.cu_responses, batch.outcomes
    right = outcomes >= 0.5
    rare = (reference < RARE) & ~right.repeat_interleave(cu.diff())
    token = rewards.token / beta
    lengths = cu.diff()
    per_token = sequence_sums(token, cu) / lengths
    figures = {
        "prm/pairwise_accuracy": pairwise_accuracy(rewards.logits, outcomes, batch.groups),
        "prm/sign_accuracy": float(((rewards.logits > 0) == right).float().mean()),
        "reward/right": _mean(per_token[right]),
        "reward/wrong": _mean(per_token[~right]),
        "reward/rare_wrong": _mean(token[rare]),
        "reward/max_log_ratio": float(token.abs().max()),
    }
    if update is not None:
        figures |= {"prm/loss": update.loss, "prm/grad_norm": update.grad_norm, "skipped/prm": update.skipped}
    return figures


def of_policy(advantages: Advantages, update: PolicyUpdate) -> Figures:
    """The policy's update."""
    return {
        "advantage/process_share": advantages.process_share,
        "policy/loss": update.loss,
        "policy/grad_norm": update.grad_norm,
        "policy/clip_fraction": update.clip_fraction,
        "policy/kl": update.approx_kl,
        "policy/ratio_max": update.ratio_max,
        "skipped/policy": update.skipped,
    }


def of_evaluation(greedy: Sequence[Group], sampled: Sequence[Group]) -> Figures:
    """Accuracy on held-out prompts."""
    figures = {"eval/greedy": sum(group.accuracy for group in greedy) / max(1, len(greedy))}
    if sampled:
        figures["eval/sampled"] = sum(group.accuracy for group in sampled) / len(sampled)
    return figures


def _mean(values: Tensor) -> float:
    return float(values.mean()) if values.numel() else 0.0


def peak_memory_gib(device: torch.device) -> float:
    """Peak since its last reset, GiB: of the GPU's allocator, on a CPU of the process's resident memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    with contextlib.suppress(OSError):
        found = re.search(r"^VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text(), re.M)
        if found:
            return int(found.group(1)) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def reset_peak_memory(device: torch.device) -> None:
    """Lets the peak begin again at what is held now. Without Linux's way to it a CPU's stays that of the process."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def described(figures: Figures) -> str:
    """Accuracies for people: `greedy 0.31, sampled 0.18`."""
    return ", ".join(f"{name.removeprefix('eval/')} {value:.3f}" for name, value in figures.items())


def short_batch(collected: Collected, wanted: int) -> str:
    """Why a batch has fewer prompts than wanted."""
    reasons = ", ".join(f"{count} {reason}" for reason, count in collected.dropped.most_common())
    kept = len(collected.groups)
    return f"{kept} of {wanted} prompts passed the filter, {collected.seen} were tried ({reasons or 'none dropped'})"


class Clock:
    """Seconds and peak memory by stage, the device's queued work included. Stages come one after the other.

    What a stage raises is told with its name, step and process, and so is, on stderr, a stage of several processes that
    takes nearly as long as they wait for each other.
    """

    def __init__(self, world: World = ALONE) -> None:
        self._world = world
        self.step = 0
        """Of the stages that come."""
        self.seconds: dict[str, float] = {}
        self.peaks: dict[str, float] = {}
        """GiB."""

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        device, where = self._world.device, f"in stage {stage!r} of step {self.step}, {self._world}"
        reset_peak_memory(device)
        began = time.perf_counter()
        try:
            with self._told_if_long(where):
                yield
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
        except Exception as error:
            error.add_note(where)
            raise
        self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - began
        self.peaks[stage] = max(self.peaks.get(stage, 0.0), peak_memory_gib(device))

    @contextmanager
    def _told_if_long(self, where: str) -> Iterator[None]:
        """From a thread: this one may wait for the device and never come back."""
        if self._world.size == 1:
            yield
            return
        patience = self._world.timeout.total_seconds()
        text = f"{where}, for {NEARLY * patience:g} s now; no process waits for another longer than {patience:g} s"
        watcher = threading.Timer(NEARLY * patience, lambda: print(text, file=sys.stderr, flush=True))
        watcher.daemon = True
        watcher.start()
        try:
            yield
        finally:
            watcher.cancel()

    def figures(self, tokens: int, flops: Mapping[str, float] | None = None, peak: float | None = None) -> Figures:
        """Time, throughput and memory since the last call, of the slowest and of the fullest process. Collective.

        Args:
            tokens: of the batch, all processes together.
            flops: model FLOPs by stage, all processes together: `flops.stage_flops`.
            peak: FLOP/s that all devices together could reach: `hardware.peak_flops` times their number.
        """
        mine = [sum(self.seconds.values()), *self.seconds.values(), *self.peaks.values()]
        whole, *most = self._world.max(torch.tensor(mine, dtype=torch.float64)).tolist()
        seconds = dict(zip(self.seconds, most, strict=False))
        peaks = dict(zip(self.peaks, most[len(seconds) :], strict=True))
        self.seconds, self.peaks = {}, {}
        training = sum(of_stage for stage, of_stage in seconds.items() if stage != "eval")
        figures = {
            **{f"time/{stage}": of_stage for stage, of_stage in seconds.items()},
            "time/step": whole,
            "throughput/tokens_per_s": tokens / training if training else 0.0,
            **{f"memory/{stage}_gib": held for stage, held in peaks.items()},
            "memory/peak_gib": max(peaks.values(), default=0.0),
        }
        timed = {stage: n for stage, n in (flops or {}).items() if seconds.get(stage)}
        if timed and peak:
            figures |= {f"throughput/mfu_{stage}": n / seconds[stage] / peak for stage, n in timed.items()}
            figures["throughput/mfu"] = sum(timed.values()) / sum(seconds[stage] for stage in timed) / peak
        return figures
