"""Rows of every supported form to prompts and demonstrations, and the stream that hands them out."""

import json
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prime_train.config.keys import Data
from prime_train.data import prompts as data
from prime_train.data.prompts import (
    RowDemonstrations,
    RowPrompts,
    Stream,
    chat,
    dressed,
    load_prompts,
    load_rows,
    problem,
)
from tests.support.paths import DATA
from tests.support.tiny import EOS, TOKENIZER, write_jsonl

EURUS = {
    "data_source": "numina_olympiads",
    "prompt": [{"role": "system", "content": "be brief"}, {"role": "user", "content": "1+1"}],
    "ability": "math",
    "reward_model": {"style": "rule", "ground_truth": "2"},
    "extra_info": {"split": "train", "index": 17},
}


def shared(name: str) -> str:
    found = next(iter(DATA.glob(name)), None)
    if found is None:
        pytest.skip(f"needs {DATA / name}")
    return str(found)


def prompts(rows, system="none", suffix=False):
    return RowPrompts(rows, TOKENIZER, system=system, suffix=suffix)


# -- the forms of rows --


def test_a_eurus_row_keeps_its_prompt_ability_tests_and_index():
    tests = json.dumps({"inputs": ["1\n"], "outputs": ["2\n"]})
    code = {**EURUS, "ability": "code", "reward_model": {"style": "rule", "ground_truth": tests}}
    math, program = prompts([EURUS, code])
    assert (math.id, math.text, math.ability, math.reference) == ("17", "1+1", "math", "2")
    assert (program.ability, json.loads(program.reference)) == ("code", json.loads(tests))


def test_eurus_rows_come_out_of_a_parquet_file(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    rows = [{**EURUS, "extra_info": {"split": "train", "index": i}} for i in range(3)]
    path = tmp_path / "train.parquet"
    datasets.Dataset.from_list(rows).to_parquet(path)
    found = prompts(load_rows(str(path)))
    assert [(prompt.id, prompt.text, prompt.reference) for prompt in found] == [(str(i), "1+1", "2") for i in range(3)]


def test_gsm8ks_answer_is_what_follows_the_last_hashes():
    row = {"question": "2+2?", "answer": "2+2 = <<2+2=4>>4\n#### 1,004"}
    assert problem(row, 0) == ([{"role": "user", "content": "2+2?"}], "math", "1,004")


@pytest.mark.parametrize("asked", ["problem", "question", "prompt"])
@pytest.mark.parametrize("answer", ["reference", "ground_truth", "answer", "expected_answer"])
def test_plain_rows_may_name_their_columns_in_several_ways(asked, answer):
    assert problem({asked: "1+1", answer: 2, "ability": "code"}, 0) == (
        [{"role": "user", "content": "1+1"}],
        "code",
        "2",
    )


def test_a_row_without_an_answer_is_refused_with_its_number_and_columns():
    with pytest.raises(ValueError, match=r"row 1 needs one of the columns reference, .*; it has problem, hint"):
        prompts([{"problem": "1", "answer": "1"}, {"problem": "1", "hint": "2"}])[1]


def test_a_row_of_id_0_keeps_it():
    rows = [{"id": 4, "problem": "1", "answer": "1"}, {"id": 0, "problem": "1", "answer": "1"}]
    assert [prompt.id for prompt in prompts(rows)] == ["4", "0"]


@pytest.mark.parametrize(
    "content", ['{"a": [1, 2], "b": ["x", "y"]}', '{"a": {"0": 1, "1": 2}, "b": {"0": "x", "1": "y"}}']
)
def test_json_may_be_columns_as_lists_or_by_row_number(tmp_path, content):
    path = tmp_path / "rows.json"
    path.write_text(content)
    assert load_rows(str(path)) == [{"a": 1, "b": "x"}, {"a": 2, "b": "y"}]


def test_json_may_be_a_list_of_rows(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text('[{"a": 1}, {"a": 2}]')
    assert load_rows(str(path)) == [{"a": 1}, {"a": 2}]


def test_a_broken_line_is_named(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": 1}\n\n{"a": \n')
    with pytest.raises(ValueError, match=r"rows.jsonl, line 3, is not JSON"):
        load_rows(str(path))


# -- published files --


@pytest.mark.parametrize(("name", "rows"), [("gsm8k/train.jsonl", 7473), ("gsm8k/test.jsonl", 1319)])
def test_every_row_of_gsm8k_is_a_math_problem_with_a_number_for_an_answer(name, rows):
    found = load_rows(shared(name))
    assert len(found) == rows
    for i, row in enumerate(found):
        messages, ability, answer = problem(row, i)
        assert ability == "math"
        assert messages[0]["content"] == row["question"]
        float(answer.replace(",", ""))


def test_every_aime_problem_has_a_whole_number_for_an_answer():
    found = load_rows(shared("eval/*validation-aime.jsonl"))
    assert len(found) == 90
    assert all(0 <= int(problem(row, i)[2]) <= 999 for i, row in enumerate(found))


def test_every_row_of_math_500s_columns_is_a_problem_with_an_answer():
    found = load_rows(shared("eval/math500__*.json"))
    assert len(found) == 500
    for i, row in enumerate(found):
        messages, ability, answer = problem(row, i)
        assert ability == "math"
        assert messages[0]["content"]
        assert answer


# -- dressing --


def test_the_action_prompt_is_the_model_cards():
    assert (
        data.SYSTEM
        == """
When tackling complex reasoning tasks, you have access to the following actions. Use them as needed to progress through your thought process.

[ASSESS]

[ADVANCE]

[VERIFY]

[SIMPLIFY]

[SYNTHESIZE]

[PIVOT]

[OUTPUT]

You should strictly follow the format below:

[ACTION NAME]

# Your action step 1

# Your action step 2

# Your action step 3

...

Next action: [NEXT ACTION NAME]
"""  # noqa: E501
    )


ASKED = [{"role": "user", "content": "1+1"}]


def test_the_answers_format_is_asked_for_as_the_model_card_does():
    math = dressed(ASKED, "math", "none", True)[-1]["content"]
    assert math == "1+1\n\nPresent the answer in LaTex format: \\boxed{Your answer}"
    code = dressed(ASKED, "code", "none", True)[-1]["content"]
    assert code == (
        "1+1\n\nWrite Python code to solve the problem. Present the code in \n```python\nYour code\n```\nat the end."
    )


def test_dressing_adds_nothing_twice_and_changes_no_row():
    once = dressed(ASKED, "math", "actions", True)
    assert once[0] == {"role": "system", "content": data.SYSTEM}
    assert dressed(once, "math", "actions", True) == once
    assert ASKED == [{"role": "user", "content": "1+1"}]


def test_a_system_prompt_of_the_data_stays():
    assert dressed(EURUS["prompt"], "math", "actions", False)[0]["content"] == "be brief"


def test_a_system_prompt_may_be_given_in_words_or_left_out():
    assert dressed(ASKED, "math", "think", False)[0] == {"role": "system", "content": "think"}
    assert dressed(ASKED, "math", "none", False) == ASKED


def test_a_prompt_ends_where_the_answer_begins():
    [prompt] = prompts([{"problem": "1+1", "answer": "2"}])
    assert TOKENIZER.decode(prompt.tokens) == "<q>1+1<a>"


# -- chats --

CHATS = {
    "messages": {
        "messages": [
            {"role": "user", "content": "1"}, {"role": "assistant", "content": "2"},
            {"role": "user", "content": "3"}, {"role": "assistant", "content": "45"},
        ]
    },
    "conversations": {
        "conversations": [
            {"from": "human", "value": "1"}, {"from": "gpt", "value": "2"},
            {"from": "human", "value": "3"}, {"from": "gpt", "value": "45"},
        ]
    },
}  # fmt: skip


@pytest.mark.parametrize("form", CHATS)
def test_each_answer_of_a_chat_is_an_example_after_what_precedes_it(form):
    [(first, answer), (second, last)] = RowDemonstrations([CHATS[form]], TOKENIZER, system="none")[0]
    assert (TOKENIZER.decode(first), TOKENIZER.decode(answer)) == ("<q>1<a>", "2<eos>")
    assert (TOKENIZER.decode(second), TOKENIZER.decode(last)) == ("<q>1<a>2<eos><q>3<a>", "45<eos>")
    assert answer[-1] == last[-1] == EOS


def test_a_conversation_may_have_a_system_prompt_of_its_own():
    assert chat({**CHATS["conversations"], "system": "think"}, 0)[0] == {"role": "system", "content": "think"}


@pytest.mark.parametrize("answer", ["response", "completion", "solution", "answer"])
def test_a_problem_with_its_solution_is_a_chat_too(answer):
    want = [{"role": "user", "content": "1"}, {"role": "assistant", "content": "2"}]
    assert chat({"problem": "1", answer: "2"}, 0) == want


# -- the stream --


def stream(items, seed=0, max_tokens=10**9, **state):
    return Stream(items, lambda item: item, seed=seed, max_tokens=max_tokens, **state)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 20), st.integers(0, 100), st.integers(1, 3))
def test_each_epoch_is_a_permutation(size, seed, epochs):
    taken = stream(range(size), seed=seed).take(size * epochs)
    for epoch in range(epochs):
        assert sorted(taken[epoch * size : (epoch + 1) * size]) == list(range(size))


def test_epochs_and_seeds_have_orders_of_their_own():
    orders = []
    for seed in range(3):
        taken = stream(range(30), seed=seed).take(90)
        orders += [tuple(taken[e * 30 : (e + 1) * 30]) for e in range(3)]
    assert len(set(orders)) == 9


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=12), st.integers(0, 20), st.integers(1, 30))
def test_a_stream_goes_on_from_its_position_and_count(items, first, more):
    items = [1, *items]
    whole = stream(items, max_tokens=5)
    want = [whole.take(1)[0] for _ in range(first + more)]
    stopped = stream(items, max_tokens=5)
    stopped.take(first)
    resumed = stream(items, max_tokens=5, position=stopped.position, dropped=stopped.dropped)
    assert resumed.take(more) == want[first:]
    assert (resumed.position, resumed.dropped) == (whole.position, whole.dropped)


def test_too_long_items_are_dropped_and_counted():
    numbers = list(range(1, 11))
    found = stream(numbers, max_tokens=7)
    taken = found.take(7)
    assert sorted(taken) == numbers[:7]
    assert found.dropped == found.position - 7 <= 3
    assert sorted(found.take(7)) == numbers[:7]
    assert 3 <= found.dropped == found.position - 14 <= 6


def test_a_short_row_is_found_among_long_ones_wherever_a_pass_begins():
    for seed in range(50):
        assert stream([1, 6, 6, 6], seed=seed, max_tokens=5).take(5) == [1] * 5


def test_data_of_which_every_row_is_too_long_is_refused():
    with pytest.raises(ValueError, match="every row of the data is longer than 4 tokens"):
        stream([5, 6, 7], max_tokens=4).take(1)


def test_empty_data_is_refused():
    with pytest.raises(ValueError, match="the data has no rows"):
        stream([])


def test_training_and_held_out_prompts_come_from_their_own_sources(tmp_path):
    files = {
        name: write_jsonl(tmp_path / f"{name}.jsonl", [{"problem": text, "answer": "0"}])
        for name, text in (("train", "1+1"), ("eval", "2+2"))
    }
    config = Data(**files, system="none", suffix=False)
    assert load_prompts(config, TOKENIZER, held_out=False)[0].text == "1+1"
    assert load_prompts(config, TOKENIZER, held_out=True)[0].text == "2+2"


def test_generated_prompts_and_demonstrations_fit_each_other():
    config = Data(train="arithmetic:3", eval="arithmetic:3", system="none")
    asked = load_prompts(config, TOKENIZER, held_out=False)
    worked = data.load_demonstrations("arithmetic:3", config, TOKENIZER)
    index = random.Random(0).randrange(len(asked))
    [(prompt, answer)] = worked[index]
    assert tuple(prompt) == asked[index].tokens
    assert answer[-1] == EOS
    assert torch.tensor(answer).min() >= 0


@pytest.mark.parametrize(
    ("name", "reference"),
    [("minerva_math__test.jsonl", "1.6"), ("olympiadbench__test.jsonl", "2")],
)
def test_answers_in_a_boxed_solution_or_a_list_are_found(name, reference):
    assert problem(load_rows(shared(f"eval/{name}"))[0], 0)[1:] == ("math", reference)
