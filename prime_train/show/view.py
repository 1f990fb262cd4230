"""What a person sees of a run: progress bars, a line a step, tables of samples coloured by token reward."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..records import Group, ProcessRewards
from .measures import Figures, described

SAMPLED_PROMPTS = 3


class View:
    """Writes to a terminal, or plain lines where there is none, or nothing."""

    def __init__(self, console: Console | None = None, *, quiet: bool = False) -> None:
        self.console = console or Console(highlight=False, quiet=quiet)

    def say(self, message: str) -> None:
        self.console.print(message, soft_wrap=True, markup=False)

    def warn(self, message: str) -> None:
        self.console.print(Text(f"warning: {message}", style="yellow"), soft_wrap=True)

    @contextmanager
    def bar(self, name: str, total: int, done: int = 0) -> Iterator[Callable[[str], None]]:
        """A progress bar; calling what it gives advances it by one and shows the text beside it.

        Without a terminal each advance is a line, at most about twenty of them.
        """
        if not self.console.is_terminal:
            every = max(1, (total - done) // 20)
            at = done

            def line(text: str) -> None:
                nonlocal at
                at += 1
                if (at - done) % every == 0 or at == total:
                    self.say(f"{name} {at}/{total}  {text}")

            yield line
            return
        columns = (
            TextColumn("{task.description}"), BarColumn(bar_width=24), MofNCompleteColumn(), TimeElapsedColumn(),
            TimeRemainingColumn(), TextColumn("{task.fields[text]}"),
        )  # fmt: skip
        with Progress(*columns, console=self.console) as progress:
            task = progress.add_task(name, total=total, completed=done, text="")
            yield lambda text: progress.update(task, advance=1, text=text)

    def samples(self, title: str, samples: Sequence[dict[str, Any]]) -> None:
        """Responses with each token on a colour from red (negative reward) over none to green (positive)."""
        if not samples:
            return
        table = Table(title=title, show_lines=True, title_justify="left")
        table.add_column("prompt", overflow="fold", ratio=1)
        table.add_column("response, coloured by token reward", overflow="fold", ratio=3)
        table.add_column("outcome", justify="right")
        for sample in samples:
            rewards = sample["rewards"] or [0.0] * len(sample["pieces"])
            table.add_row(Text(sample["prompt"]), coloured(sample["pieces"], rewards), f"{sample['outcome']:.2f}")
        self.console.print(table)


def coloured(pieces: Sequence[str], rewards: Sequence[float]) -> Text:
    """Tokens on backgrounds by reward, scaled to the largest of the response."""
    scale = max((abs(reward) for reward in rewards), default=0.0) or 1.0
    text = Text()
    for piece, reward in zip(pieces, rewards, strict=True):
        depth = int(110 * abs(reward) / scale)
        style = f"on rgb({depth},0,0)" if reward < 0 else f"on rgb(0,{depth},0)"
        text.append(piece, style=style if depth > 10 else "")
    return text


def token_samples(
    groups: Sequence[Group], rewards: ProcessRewards | None, cu_seqlens: Tensor, tokenizer: PreTrainedTokenizerBase
) -> list[dict[str, Any]]:
    """A right and a wrong response of the first prompts, token by token with their process rewards."""
    samples: list[dict[str, Any]] = []
    first = 0
    for group in groups[:SAMPLED_PROMPTS]:
        order = sorted(range(len(group.responses)), key=lambda i: group.outcomes[i])
        for i in (order[-1], order[0]):
            tokens = group.responses[i].tokens
            start = int(cu_seqlens[first + i])
            samples.append(
                {
                    "prompt": group.prompt.text,
                    "reference": group.prompt.reference,
                    "outcome": group.outcomes[i],
                    "pieces": tokenizer.batch_decode([[token] for token in tokens]),
                    "rewards": None if rewards is None else rewards.token[start : start + len(tokens)].tolist(),
                }
            )
        first += len(group.responses)
    return samples


def step_summary(figures: Figures) -> str:
    """The figures that matter of one step, for the side of a progress bar."""
    shown = [f"accuracy {figures['accuracy/before_filter']:.2f}"]
    if "prm/pairwise_accuracy" in figures:
        shown.append(f"PRM {figures['prm/pairwise_accuracy']:.2f}")
        shown.append(f"log-ratio right {figures['reward/right']:+.3f} wrong {figures['reward/wrong']:+.3f}")
    if "eval/greedy" in figures:
        shown.append("held out: " + described({k: v for k, v in figures.items() if k.startswith("eval/")}))
    shown.append(f"{figures['throughput/tokens_per_s']:.0f} tokens/s")
    return "  ".join(shown)
