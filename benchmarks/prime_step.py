"""One PRIME step by stage on one GPU, against the plan: `python -m benchmarks.prime_step --out DIR`.

    python -m benchmarks.prime_step --out DIR [--model qwen2.5-1.5b] [--prompts 64] [--samples 4] [--max-tokens 1024]
    python -m benchmarks.prime_step --out DIR --dry      a tiny model on a CPU, to see that everything runs

The model has the shape of Qwen2.5, vocabulary included, and random weights, so nothing needs to be downloaded. No
response ends before its limit, half of them count as right, and the filter lets every prompt pass: every step has the
same work. Blocks are recomputed where they would not fit otherwise, by the plan. The first step compiles kernels and
fills caches; each figure is the median over the others. DIR gets prime_step.json and prime_step.md.
"""

import argparse
import contextlib
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen2Config

from benchmarks.environment import describe
from benchmarks.records import NO_CLAIMS
from benchmarks.step_figures import Figure, compared, figures_table
from prime_train import prime
from prime_train.config.keys import Config
from prime_train.data import arithmetic
from prime_train.plan.command import plan_here
from prime_train.plan.durations import Lengths, batch_tokens
from prime_train.plan.flops import stage_flops
from prime_train.plan.hardware import peak_flops
from prime_train.plan.records import Plan
from prime_train.plan.sizes import sizes_of
from prime_train.run import setup
from prime_train.run.directory import read_records
from prime_train.run.interrupt import Interrupts
from prime_train.show.view import View

SHAPES: dict[str, dict[str, Any]] = {
    # config.json of Qwen/Qwen2.5-0.5B and -1.5B
    "qwen2.5-0.5b": {
        "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14,
        "num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True,
    },
    "qwen2.5-1.5b": {
        "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12,
        "num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True,
    },
    "dry": {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
        "num_key_value_heads": 2, "vocab_size": 512, "tie_word_embeddings": True,
    },
}  # fmt: skip
MINUTES = 8.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """What is measured."""

    model: str = "qwen2.5-1.5b"
    prompts: int = 64
    samples: int = 4
    max_tokens: int = 1024
    """Of every response."""
    rows: int = 16
    """Sequences a micro-batch."""
    steps: int = 4
    """The first one is not reported."""
    operations: int = 62
    """Of the arithmetic in a prompt, two tokens each."""

    @property
    def lengths(self) -> Lengths:
        """Of every prompt, `<q>17+5…<a>`, and every response."""
        return Lengths(prompt=2 * self.operations + 4, response=self.max_tokens)


DRY = Workload(model="dry", prompts=2, samples=2, max_tokens=8, rows=2, steps=2, operations=4)


class Finished(Exception):
    """The last step is in metrics.jsonl. Ends the run before its checkpoint, which would be written for nobody."""


class UntilView(View):
    """Shows a run and ends it after so many steps, or sooner where another one would not be over by the deadline."""

    def __init__(self, steps: int, deadline: float) -> None:
        super().__init__()
        self.steps, self.deadline = steps, deadline

    @contextmanager
    def bar(self, name: str, total: int, done: int = 0) -> Iterator[Callable[[str], None]]:
        """As `View`'s; advancing it raises `Finished` after the last step."""
        times = [time.monotonic()]
        with super().bar(name, self.steps, done) as advance:

            def step(text: str) -> None:
                advance(text)
                times.append(time.monotonic())
                over = times[-1] + (times[-1] - times[-2]) > self.deadline
                if len(times) > self.steps or (over and len(times) > 2):
                    raise Finished

            yield step


def make_model(directory: Path, shape: str, device: str = "cpu") -> None:
    """Random weights of the Qwen2 architecture that no token ends, drawn on the device, and a tokenizer for them."""
    size = SHAPES[shape]["vocab_size"]
    config = Qwen2Config(**SHAPES[shape], max_position_embeddings=4096, bos_token_id=None, eos_token_id=None)
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.generation_config.eos_token_id = size  # the token after the last one that the head has
    model.save_pretrained(directory)
    make_tokenizer(size).save_pretrained(directory)


def make_tokenizer(size: int) -> PreTrainedTokenizerFast:
    """That of `arithmetic` without an end of sequence, and a word for every further token, so that texts differ."""
    known = arithmetic.tokenizer().get_vocab()
    words = {f"[{i}]": i for i in range(len(known), size)}
    characterwise = Tokenizer(models.WordLevel(known | words, unk_token="<unk>"))
    characterwise.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    characterwise.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=characterwise, unk_token="<unk>", pad_token="<pad>",
        additional_special_tokens=["<q>", "<a>"], clean_up_tokenization_spaces=False,
    )  # fmt: skip
    tokenizer.chat_template = arithmetic.CHAT_TEMPLATE
    return tokenizer


def planned(work: Path, workload: Workload, device: str) -> tuple[Config, Plan]:
    """The run of this workload with the model in `work`, blocks recomputed where they do not fit otherwise."""
    lengths = workload.lengths
    mini_batch = workload.prompts * workload.samples // 2
    held_out = work / "none.jsonl"
    held_out.touch()
    sections: dict[str, Any] = {
        "run": {"dir": work / "run", "steps": workload.steps + 1, "checkpoint_every": 0, "device": device},
        "model": {
            "policy": str(work / "model"),
            "tokens_per_micro_batch": workload.rows * (lengths.prompt + lengths.response),
        },
        "data": {
            "train": f"arithmetic:{workload.operations}", "eval": str(held_out), "max_prompt_tokens": lengths.prompt,
        },
        "rollout": {
            "prompts": workload.prompts, "samples": workload.samples, "max_tokens": lengths.response, "cache_gib": 16.0,
        },
        "filter": {"low": 0, "high": 1},
        "verify": {"custom": "benchmarks.coin:toss", "workers": 2},
        "prm": {"mini_batch": mini_batch},
        "policy": {"mini_batch": mini_batch},
        "eval": {"every": 0, "prompts": 1},  # of which there is none
    }  # fmt: skip
    config = Config.model_validate(sections)
    plan = plan_here(config, lengths)
    if not plan.fits:
        sections["model"]["blocks"] = ["checkpoint"]
        config = Config.model_validate(sections)
        plan = plan_here(config, lengths)
    return config, plan


def measure(workload: Workload, *, device: str, deadline: float) -> dict[str, Any]:
    """The report: figures, and all that one must know of them.

    Args:
        deadline: time.monotonic() after which no step should end.
    """
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        make_model(work / "model", workload.model, device)
        config, plan = planned(work, workload, device)
        with contextlib.suppress(Finished), setup.joined_world(config) as world:
            prime.train(config, UntilView(workload.steps, deadline), world, Interrupts())
        steps = [record for record in read_records(config.run.dir / "metrics.jsonl") if "time/step" in record]
        sizes = sizes_of(AutoConfig.from_pretrained(work / "model"))
    flops = stage_flops(config, batch_tokens(config, workload.lengths), policy=sizes)
    peak = peak_flops(torch.device(device), getattr(torch, config.model.dtype))
    return {
        "kind": "gpu" if device == "cuda" else "dry",
        "environment": describe(torch.device(device)),
        "workload": asdict(workload),
        "blocks": list(config.model.blocks),
        "attention": setup.attention_of(config),
        "fits": plan.fits,
        "steps": len(steps),
        "response_tokens": min(step["response/length"] for step in steps),
        "accuracy": sum(step["accuracy/after_filter"] for step in steps) / len(steps),
        "figures": [asdict(figure) for figure in compared(plan, flops, peak, steps[1:])],
        "peak_flops": peak,
        "assumptions": list(plan.assumptions),
        "metrics": steps,
    }


def markdown(report: dict[str, Any]) -> str:
    """The report for readers."""
    environment, workload = report["environment"], Workload(**report["workload"])
    blocks = "recomputed in backward, without which the plan does not fit" if report["blocks"] else "not recomputed"
    held = "tensors on the GPU held" if report["kind"] == "gpu" else "the process held, its libraries included"
    what = (
        f"{workload.model} with random weights, {workload.prompts} prompts of {workload.lengths.prompt} tokens × "
        f"{workload.samples} responses of {report['response_tokens']:.0f}, of which {report['accuracy']:.0%} count as "
        f"right; {workload.rows} sequences a micro-batch, blocks {blocks}, attention {report['attention']}. Medians of "
        f"{report['steps'] - 1} of {report['steps']} steps; a ratio is measured over predicted; MFU is a share of "
        f"{report['peak_flops'] / 1e12:.3g} TFLOP/s, and memory the most that {held}."
    )
    lines = ["# A PRIME step against its plan", "", ", ".join(f"{name} {value}" for name, value in environment.items())]
    if report["kind"] != "gpu":
        lines += ["", NO_CLAIMS]
    if not report["fits"]:
        lines += ["", "The plan does not fit into this device's memory."]
    lines += ["", what, "", figures_table([Figure(**figure) for figure in report["figures"]])]
    lines += ["", "The plan assumes:", "", *(f"- {line}" for line in report["assumptions"])]
    return "\n".join(lines) + "\n"


def main() -> None:
    begun = time.monotonic()
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="directory of the results")
    parser.add_argument("--model", choices=[name for name in SHAPES if name != DRY.model])
    parser.add_argument("--prompts", type=int)
    parser.add_argument("--samples", type=int, help="responses to each prompt")
    parser.add_argument("--max-tokens", type=int, help="tokens of every response")
    parser.add_argument("--rows", type=int, help="sequences a micro-batch")
    parser.add_argument("--steps", type=int, help="at least 2; the first one is not reported")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="fewer steps where these would take longer")
    parser.add_argument("--dry", action="store_true", help="a tiny model on a CPU, to see that it runs")
    options = parser.parse_args()
    base = DRY if options.dry else Workload()
    given = {name: value for name in asdict(base) if (value := getattr(options, name, None)) is not None}
    workload = replace(base, **given)
    if workload.steps < 2:
        parser.error(f"--steps must be at least 2, got {workload.steps}")
    if not options.dry and not torch.cuda.is_available():
        parser.error("this needs a GPU; --dry runs a tiny model on the CPU")
    setup.keep_freed_memory()
    setup.quiet_transformers()
    device = "cpu" if options.dry else "cuda"
    report = measure(workload, device=device, deadline=begun + 60 * options.minutes)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "prime_step.json").write_text(json.dumps(report, indent=1) + "\n")
    (options.out / "prime_step.md").write_text(markdown(report))
    print(markdown(report))


if __name__ == "__main__":
    main()
