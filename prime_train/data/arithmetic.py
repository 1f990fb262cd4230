"""A task made up by a program: chains of additions and subtractions modulo 100, worked step by step.

    problem      17+5-3+4
    worked       :17+5=22        done with care
                 ~22-3=29        careless: ten too many
                 ~29+4=33        careless, but right
                 #33             what the steps came to; the answer is 23

A model trained on such demonstrations writes both kinds of steps and so fails at most chains. Nothing in them says
which kind is better: that is for reinforcement learning to find out from the outcome alone.
"""

import random
import zlib
from dataclasses import dataclass

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

MODULUS = 100
CAREFUL, SLOPPY, ANSWER = ":", "~", "#"
SLIP, SLIP_RATE = 10, 0.6
"""What a careless step adds to its result, and how often it does."""
SLOPPY_RATE = 0.6
"""How many of the demonstrated steps are careless."""
OPERATIONS = 4
CHAT_TEMPLATE = (
    "{% for m in messages %}"
    "{% if m['role'] == 'assistant' %}<a>{{ m['content'] }}<eos>{% else %}<q>{{ m['content'] }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
)


@dataclass(frozen=True, slots=True)
class Chain:
    """start below 100, then (sign, operand) after (sign, operand), operands from 1 to 5."""

    start: int
    steps: tuple[tuple[int, int], ...]

    @property
    def answer(self) -> int:
        return (self.start + sum(sign * operand for sign, operand in self.steps)) % MODULUS

    def __str__(self) -> str:
        return f"{self.start:02}" + "".join(f"{'+' if sign > 0 else '-'}{operand}" for sign, operand in self.steps)


def chain(index: int, operations: int, held_out: bool) -> Chain:
    """The index-th chain to learn from, or of those held out; no chain is of both kinds."""
    rng = random.Random(f"{operations} {held_out} {index}")
    while True:
        steps = tuple((rng.choice((1, -1)), rng.randint(1, 5)) for _ in range(operations))
        drawn = Chain(rng.randrange(MODULUS), steps)
        if (zlib.crc32(str(drawn).encode()) % 16 == 0) == held_out:
            return drawn


def demonstration(chain: Chain, rng: random.Random, sloppy: float = SLOPPY_RATE) -> str:
    """Worked steps, each careless with probability `sloppy`, and the answer that they come to, right or wrong."""
    lines, value = [], chain.start
    for sign, operand in chain.steps:
        result = (value + sign * operand) % MODULUS
        marker = SLOPPY if rng.random() < sloppy else CAREFUL
        if marker == SLOPPY and rng.random() < SLIP_RATE:
            result = (result + SLIP) % MODULUS
        lines.append(f"{marker}{value:02}{'+' if sign > 0 else '-'}{operand}={result:02}")
        value = result
    return "\n".join([*lines, f"{ANSWER}{value:02}"])


def outcome(reference: str, response: str) -> float:
    """1 if what follows the last `#` is the reference, to the letter; else 0."""
    _, found, answer = response.rpartition(ANSWER)
    return float(bool(found) and answer == reference)


def tokenizer() -> PreTrainedTokenizerFast:
    """One token a character that the task uses, and a chat template."""
    special = ["<pad>", "<eos>", "<q>", "<a>"]
    characters = [*"0123456789+-=", CAREFUL, SLOPPY, ANSWER, "\n"]
    vocabulary = {token: i for i, token in enumerate(["<unk>", *special, *characters])}
    characterwise = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    characterwise.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    characterwise.decoder = decoders.Fuse()
    tok = PreTrainedTokenizerFast(
        tokenizer_object=characterwise, unk_token="<unk>", pad_token="<pad>", eos_token="<eos>",
        additional_special_tokens=["<q>", "<a>"], clean_up_tokenization_spaces=False,
    )  # fmt: skip
    tok.chat_template = CHAT_TEMPLATE
    return tok
