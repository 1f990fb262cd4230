"""Data of one's own: a .jsonl file of problems and answers, and what becomes of its rows.

    python examples/6_own_data.py

Writes a small file, reads it as training does, and shows the prompts as the model gets them; then the row that is too
long, which is dropped and counted, and rows that are refused, with what is said of them. The tokenizer is made here,
of bytes, so that nothing has to be downloaded; a run takes the model's own. The file is gone in the end.
"""

import contextlib
import json
import tempfile
import textwrap
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from prime_train.config.settings import load_config
from prime_train.data.prompts import Stream, load_prompts, prompt_length

# A problem, in one of the columns problem, question or prompt, and its answer: as such, after ####, or in a box at the
# end of a solution. A program's answer are its tests.
ROWS = [
    {"id": "sum", "problem": "What is 17 + 5?", "answer": "22"},
    {"id": "half", "question": "Half of 3?", "answer": "Half of 3 is 3/2 = 1.5.\n#### 1.5"},
    {"id": "root", "problem": "Solve x² = 9 for x > 0.", "solution": "Of ±3 take \\boxed{3}."},
    {"id": "double", "problem": "Write a program that doubles a number.", "ability": "code",
     "answer": json.dumps({"inputs": ["2\n"], "outputs": ["4\n"]})},
    {"id": "long", "problem": "Add these up: " + ", ".join(map(str, range(100))), "answer": "4950"},
]  # fmt: skip
REFUSED = [
    '{"problem": "What is 1 + 1?"}',  # no answer
    '{"problem": "What is 1 + 1?", "answer": "2"',  # cut off
]
TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, and a chat template."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bytewise = Tokenizer(models.BPE({byte: i for i, byte in enumerate(alphabet)}, merges=[]))
    bytewise.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bytewise.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bytewise, eos_token="<|end|>")
    tokenizer.chat_template = TEMPLATE
    return tokenizer


with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
    Path("problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    options = [
        "--data.train", "problems.jsonl", "--data.eval", "problems.jsonl", "--data.system", "Think step by step.",
        "--data.max_prompt_tokens", "200",
    ]  # fmt: skip
    data = load_config("qwen2.5-0.5b-gsm8k", options).data
    tokenizer = byte_tokenizer()
    prompts = load_prompts(data, tokenizer, held_out=False)

    print(f"problems.jsonl has {len(prompts)} rows; the first four as the model gets them")
    for i in range(4):
        prompt = prompts[i]
        print(f"\n{prompt.id}: {prompt.ability}, {len(prompt.tokens)} tokens, answer {prompt.reference}")
        print(textwrap.indent(str(tokenizer.decode(list(prompt.tokens))), "    "))

    # A pass over the file, in the order in which training takes its rows.
    stream = Stream(prompts, prompt_length, seed=0, max_tokens=data.max_prompt_tokens)
    taken = [prompt.id for prompt in stream.take(4)]
    print(f"\ntaken: {', '.join(taken)}; longer than {data.max_prompt_tokens} tokens and dropped: {stream.dropped}")

    for line in REFUSED:
        Path("refused.jsonl").write_text(line + "\n")
        try:
            load_prompts(data.model_copy(update={"train": "refused.jsonl"}), tokenizer, held_out=False)[0]
        except ValueError as error:
            print(textwrap.fill(f"refused: {line}: {error}", 78, subsequent_indent="    "))

print("\ntrains on such a file, held-out problems in another\n(--dry-run says what is missing):")
print("  prime-train run qwen2.5-0.5b-gsm8k --data.train problems.jsonl \\")
print('      --data.eval held-out.jsonl --data.system "Think step by step."')
