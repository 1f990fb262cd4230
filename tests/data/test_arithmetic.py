"""The made-up task: its chains, its flawed demonstrations, its verifier and its tokenizer."""

import random
from itertools import pairwise

import pytest
from transformers import AutoTokenizer

from prime_train.data import arithmetic
from prime_train.data.arithmetic import CAREFUL, SLIP, SLIP_RATE, SLOPPY, Chain, chain, demonstration, outcome
from tests.support.tiny import TOKENIZER

EXAMPLE = Chain(17, ((1, 5), (-1, 8), (1, 4)))


def test_a_chain_is_written_as_its_docstring_shows():
    assert str(EXAMPLE) == "17+5-8+4"
    assert EXAMPLE.answer == 18
    assert str(Chain(3, ((1, 9),))) == "03+9"


def test_answers_are_modulo_100():
    assert Chain(98, ((1, 5),)).answer == 3
    assert Chain(2, ((-1, 5),)).answer == 97


def test_careful_demonstrations_are_right():
    for index in range(300):
        drawn = chain(index, 5, False)
        worked = demonstration(drawn, random.Random(index), 0.0)
        assert outcome(f"{drawn.answer:02}", worked) == 1
        assert SLOPPY not in worked


def test_each_step_begins_with_what_the_one_before_came_to_right_or_wrong():
    for index in range(100):
        *lines, last = demonstration(chain(index, 5, False), random.Random(index), 0.6).split("\n")
        assert lines[0][1:3] == str(chain(index, 5, False))[:2]
        assert all(one[6:] == other[1:3] for one, other in pairwise(lines))
        assert last[1:] == lines[-1][6:]


def test_flaws_are_as_frequent_as_asked_for():
    careless = slipped = right = steps = 0
    chains = 2000
    for index in range(chains):
        drawn = chain(index, 5, False)
        worked = demonstration(drawn, random.Random(index), 0.6)
        *lines, _ = worked.split("\n")
        assert len(lines) == 5
        for line in lines:
            steps += 1
            value, sign, operand, result = int(line[1:3]), line[3], int(line[4]), int(line[6:])
            exact = (value + (operand if sign == "+" else -operand)) % 100
            careless += line[0] == SLOPPY
            slipped += result != exact
            assert result == exact or (line[0] == SLOPPY and result == (exact + SLIP) % 100)
        right += outcome(f"{drawn.answer:02}", worked) == 1
    assert careless / steps == pytest.approx(0.6, abs=0.02)
    assert slipped / careless == pytest.approx(SLIP_RATE, abs=0.02)
    # Slips do not cancel: a chain is right if it has none.
    assert right / chains == pytest.approx((1 - 0.6 * SLIP_RATE) ** 5, abs=0.02)


def test_held_out_chains_are_never_trained_on():
    trained = {str(chain(i, 3, False)) for i in range(6000)}
    held_out = {str(chain(i, 3, True)) for i in range(2000)}
    assert not trained & held_out
    assert len(trained) > 5000


def test_chains_are_drawn_by_index_alone():
    assert [chain(i, 4, False) for i in range(20)] == [chain(i, 4, False) for i in range(20)]
    for drawn in (chain(i, 7, False) for i in range(50)):
        assert len(drawn.steps) == 7
        assert 0 <= drawn.start < 100
        assert all(sign in (1, -1) and 1 <= operand <= 9 for sign, operand in drawn.steps)


@pytest.mark.parametrize(
    ("response", "score"),
    [
        ("#15", 1), (":17+5=22\n#15", 1), ("#14#15", 1),
        ("15", 0), ("#15#14", 0), ("#15 ", 0), ("#15\n", 0), ("#015", 0), ("# 15", 0), ("#", 0), ("", 0),
        ("#15<eos>", 0),
    ],
)  # fmt: skip
def test_the_verifier_wants_the_answer_to_the_letter_after_the_last_hash(response, score):
    assert outcome("15", response) == score


def test_every_character_of_the_task_is_a_token_and_back():
    worked = ":17+5=22\n~22-8=24\n#24"
    tokens = TOKENIZER(str(EXAMPLE) + "\n" + worked, add_special_tokens=False)["input_ids"]
    assert TOKENIZER.decode(tokens) == f"{EXAMPLE}\n{worked}"
    assert len(tokens) == len(str(EXAMPLE)) + 1 + len(worked)
    assert TOKENIZER.unk_token_id not in tokens
    assert {CAREFUL, SLOPPY} <= set(worked)


def test_a_character_of_no_task_is_unknown():
    assert TOKENIZER("x", add_special_tokens=False)["input_ids"] == [TOKENIZER.unk_token_id]


def test_the_tokenizer_is_the_same_when_saved_and_loaded(tmp_path):
    TOKENIZER.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    messages = [{"role": "user", "content": "17+5"}, {"role": "assistant", "content": "~17+5=12\n#12"}]
    for generate in (False, True):
        texts = [
            t.apply_chat_template(messages, tokenize=False, add_generation_prompt=generate)
            for t in (arithmetic.tokenizer(), loaded)
        ]
        assert texts[0] == texts[1]
        ids = [t(texts[0], add_special_tokens=False)["input_ids"] for t in (TOKENIZER, loaded)]
        assert ids[0] == ids[1]
        assert loaded.decode(ids[0]) == TOKENIZER.decode(ids[0]) == texts[0]
    assert (loaded.eos_token_id, loaded.pad_token_id) == (TOKENIZER.eos_token_id, TOKENIZER.pad_token_id)
