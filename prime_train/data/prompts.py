"""Prompts to sample from and demonstrations to learn from: read, rendered by the chat template, tokenized.

Rows are dictionaries of one of these forms, told apart by their columns:

    Eurus-2-RL-Data    prompt [{role, content}], ability, reward_model {ground_truth}, extra_info {index}
    GSM8K              question, answer with the result after ####
    others             prompt, problem or question (a string), answer, reference, ground_truth, final_answer or a
                       solution with the answer in a box, perhaps ability, id
    chats (SFT only)   messages [{role, content}], or conversations [{from, value}] and perhaps system
"""

import json
import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import torch
from transformers import PreTrainedTokenizerBase

from ..config.keys import Data
from ..records import Prompt
from ..verify.answers import extract_answer
from . import arithmetic

ARITHMETIC = "arithmetic"
ARITHMETIC_SIZE = 1_000_000
ACTIONS = ("ASSESS", "ADVANCE", "VERIFY", "SIMPLIFY", "SYNTHESIZE", "PIVOT", "OUTPUT")
SYSTEM = "\n{}\n".format(
    "\n\n".join(
        [
            "When tackling complex reasoning tasks, you have access to the following actions. "
            "Use them as needed to progress through your thought process.",
            *(f"[{action}]" for action in ACTIONS),
            "You should strictly follow the format below:",
            "[ACTION NAME]",
            *(f"# Your action step {i}" for i in (1, 2, 3)),
            "...",
            "Next action: [NEXT ACTION NAME]",
        ]
    )
)
"""The paper's action-centric system prompt."""
SUFFIXES = {
    "math": "\n\nPresent the answer in LaTex format: \\boxed{Your answer}",
    "code": "\n\nWrite Python code to solve the problem. Present the code in \n```python\nYour code\n```\nat the end.",
}
Message = dict[str, str]
Example = tuple[Sequence[int], Sequence[int]]
"""Tokens of what precedes an answer, and of the answer through its end of sequence."""


T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)


class Indexed(Protocol[T_co]):
    """Items by index; made when asked for."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> T_co: ...


class ArithmeticPrompts:
    """Generated chains; held-out ones are no chain of the others."""

    def __init__(self, operations: int, tokenizer: PreTrainedTokenizerBase, *, held_out: bool) -> None:
        self.operations, self.tokenizer, self.held_out = operations, tokenizer, held_out

    def __len__(self) -> int:
        return ARITHMETIC_SIZE

    def __getitem__(self, index: int) -> Prompt:
        chain = arithmetic.chain(index, self.operations, self.held_out)
        return Prompt(
            id=f"arithmetic-{'eval' if self.held_out else 'train'}-{index}", text=str(chain),
            tokens=render(self.tokenizer, [{"role": "user", "content": str(chain)}]), ability=ARITHMETIC,
            reference=f"{chain.answer:02}",
        )  # fmt: skip


class ArithmeticDemonstrations:
    """Generated chains, worked with the flaws that `arithmetic` describes."""

    def __init__(self, operations: int, tokenizer: PreTrainedTokenizerBase) -> None:
        self.operations, self.tokenizer = operations, tokenizer

    def __len__(self) -> int:
        return ARITHMETIC_SIZE

    def __getitem__(self, index: int) -> list[Example]:
        chain = arithmetic.chain(index, self.operations, held_out=False)
        worked = arithmetic.demonstration(chain, random.Random(f"demonstration {index}"))
        messages = [{"role": "user", "content": str(chain)}, {"role": "assistant", "content": worked}]
        return chat_examples(self.tokenizer, messages)


class RowPrompts:
    """Prompts of rows of a file or a hub dataset."""

    def __init__(
        self, rows: Sequence[Mapping[str, Any]], tokenizer: PreTrainedTokenizerBase, *, system: str, suffix: bool
    ) -> None:
        self.rows, self.tokenizer, self.system, self.suffix = rows, tokenizer, system, suffix

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Prompt:
        row = self.rows[index]
        messages, ability, reference = problem(row, index)
        messages = dressed(messages, ability, self.system, self.suffix)
        return Prompt(
            id=row_id(row, index), text=messages[-1]["content"], tokens=render(self.tokenizer, messages),
            ability=ability, reference=reference,
        )  # fmt: skip


class RowDemonstrations:
    """Demonstrations of rows of a file or a hub dataset: each of a chat's answers, after what precedes it."""

    def __init__(self, rows: Sequence[Mapping[str, Any]], tokenizer: PreTrainedTokenizerBase, *, system: str) -> None:
        self.rows, self.tokenizer, self.system = rows, tokenizer, system

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> list[Example]:
        return chat_examples(self.tokenizer, dressed(chat(self.rows[index], index), "", self.system, False))


def load_prompts(data: Data, tokenizer: PreTrainedTokenizerBase, *, held_out: bool) -> Indexed[Prompt]:
    """The training prompts, or the held-out ones."""
    source = data.eval if held_out else data.train
    if operations := arithmetic_operations(source):
        return ArithmeticPrompts(operations, tokenizer, held_out=held_out)
    return RowPrompts(load_rows(source), tokenizer, system=data.system, suffix=data.suffix)


def load_demonstrations(source: str, data: Data, tokenizer: PreTrainedTokenizerBase) -> Indexed[list[Example]]:
    """What the SFT stage learns from."""
    if operations := arithmetic_operations(source):
        return ArithmeticDemonstrations(operations, tokenizer)
    return RowDemonstrations(load_rows(source), tokenizer, system=data.system)


def arithmetic_operations(source: str) -> int:
    """How many operations the chains of `arithmetic` or `arithmetic:N` have; 0 for any other source."""
    name, _, operations = source.partition(":")
    if name != ARITHMETIC:
        return 0
    if operations and not (operations.isdecimal() and int(operations) > 0):
        raise ValueError(f"arithmetic:N must have N operations, 1 or more, got {source!r}")
    return int(operations or arithmetic.OPERATIONS)


def load_rows(source: str) -> Sequence[Mapping[str, Any]]:
    """Rows of a .jsonl, .json (a list, or columns) or .parquet file, or of a hub dataset named `name:split`."""
    path = Path(source)
    if path.suffix == ".jsonl":
        with path.open() as lines:
            return [_row(line, f"{path}, line {number},") for number, line in enumerate(lines, 1) if line.strip()]
    if path.suffix == ".json":
        content = json.loads(path.read_text())
        if isinstance(content, list):
            return content
        columns = {
            name: column if isinstance(column, list) else list(column.values()) for name, column in content.items()
        }
        return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    import datasets

    if path.suffix == ".parquet":
        return datasets.load_dataset("parquet", data_files=str(path), split="train")
    name, _, split = source.partition(":")
    return datasets.load_dataset(name, split=split or "train")


def _row(line: str, place: str) -> Mapping[str, Any]:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{place} is not JSON: {error.msg}") from None


def problem(row: Mapping[str, Any], index: int) -> tuple[list[Message], str, str]:
    """A row's messages, ability and reference answer or tests."""
    if "reward_model" in row:
        return list(row["prompt"]), row.get("ability", "math"), str(row["reward_model"]["ground_truth"])
    asked = _first(row, ("problem", "question", "prompt"), index)
    ability = str(row.get("ability", "math"))
    answer = _first(row, ("reference", "ground_truth", "answer", "expected_answer", "final_answer", "solution"), index)
    if isinstance(answer, list):
        answer = ", ".join(map(str, answer))
    if ability == "math" and "boxed" in str(answer):
        answer = extract_answer(str(answer), ("boxed",)) or answer
    if isinstance(answer, str) and "####" in answer:
        answer = answer.rpartition("####")[2].strip()
    messages = [{"role": "user", "content": asked}] if isinstance(asked, str) else list(asked)
    return messages, ability, str(answer)


def chat(row: Mapping[str, Any], index: int) -> list[Message]:
    """A row's messages, the answers of the assistant among them."""
    if "messages" in row:
        return list(row["messages"])
    if "conversations" in row:
        roles = {"human": "user", "gpt": "assistant"}
        turns = [{"role": roles.get(t["from"], t["from"]), "content": t["value"]} for t in row["conversations"]]
        return [{"role": "system", "content": row["system"]}, *turns] if row.get("system") else turns
    asked = _first(row, ("problem", "question", "prompt"), index)
    answer = _first(row, ("response", "completion", "solution", "answer"), index)
    asked = [{"role": "user", "content": asked}] if isinstance(asked, str) else list(asked)
    return [*asked, {"role": "assistant", "content": answer}]


def dressed(messages: Sequence[Message], ability: str, system: str, suffix: bool) -> list[Message]:
    """With the system prompt and the instruction on the answer's format, where the data has not got its own."""
    dressed = [{**message} for message in messages]
    if system != "none" and dressed[0]["role"] != "system":
        dressed.insert(0, {"role": "system", "content": SYSTEM if system == "actions" else system})
    wanted = SUFFIXES.get(ability, "") if suffix else ""
    if wanted.strip() not in dressed[-1]["content"]:
        dressed[-1]["content"] += wanted
    return dressed


def render(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> tuple[int, ...]:
    """Tokens of the chat template up to where the assistant's answer begins."""
    text = tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, tokenize=False)
    return tuple(tokenizer(str(text), add_special_tokens=False)["input_ids"])


def chat_examples(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> list[Example]:
    """Each answer of the assistant, after what precedes it."""
    examples: list[Example] = []
    for i, message in enumerate(messages):
        if message["role"] == "assistant":
            answer = tokenizer(message["content"], add_special_tokens=False)["input_ids"]
            examples.append((render(tokenizer, messages[:i]), (*answer, tokenizer.eos_token_id)))
    return examples


def row_id(row: Mapping[str, Any], index: int) -> str:
    """The row's own name, or its number."""
    names = (row.get("id"), row.get("unique_id"), (row.get("extra_info") or {}).get("index"))
    return str(next((name for name in names if name is not None), index))


def _first(row: Mapping[str, Any], names: Sequence[str], index: int) -> Any:
    for name in names:
        if row.get(name) is not None:
            return row[name]
    raise ValueError(f"row {index} needs one of the columns {', '.join(names)}; it has {', '.join(row)}")


class Stream(Generic[T]):
    """Items in an order shuffled anew on each pass; too long ones are left out and counted.

    `position` and `dropped` are all its state: a stream made with them goes on where that one stopped.
    """

    def __init__(
        self, items: Indexed[T], length: Callable[[T], int], *, seed: int, max_tokens: int, position: int = 0,
        dropped: int = 0,
    ) -> None:  # fmt: skip
        if len(items) == 0:
            raise ValueError("the data has no rows")
        self.items, self.length, self.seed, self.max_tokens = items, length, seed, max_tokens
        self.position, self.dropped = position, dropped
        self._pass, self._order = -1, torch.empty(0)

    def take(self, n: int) -> list[T]:
        """The next n items.

        Raises:
            ValueError: every item of the data is too long.
        """
        taken: list[T] = []
        refused = 0
        while len(taken) < n:
            item = self.items[self._index(self.position)]
            self.position += 1
            if self.length(item) <= self.max_tokens:
                taken.append(item)
                refused = 0
            else:
                self.dropped += 1
                refused += 1
                if refused == 2 * len(self.items):  # and so a whole pass, wherever it began
                    raise ValueError(f"every row of the data is longer than {self.max_tokens} tokens")
        return taken

    def _index(self, position: int) -> int:
        epoch, at = divmod(position, len(self.items))
        if epoch != self._pass:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            self._pass, self._order = epoch, torch.randperm(len(self.items), generator=generator)
        return int(self._order[at])


def prompt_length(prompt: Prompt) -> int:
    return len(prompt.tokens)


def demonstration_length(examples: Sequence[Example]) -> int:
    return max((len(before) + len(answer) for before, answer in examples), default=0)
