"""What a person sees."""

import io

import pytest
import torch
from rich.console import Console

from prime_train.records import Group, ProcessRewards, Prompt, Response
from prime_train.show.view import View, coloured, step_summary, token_samples
from tests.support.tiny import TOKENIZER


def view(terminal=False):
    out = io.StringIO()
    return View(Console(file=out, width=100, force_terminal=terminal, highlight=False)), out


@pytest.mark.parametrize(("total", "done", "lines"), [(3, 0, 3), (1000, 0, 20), (1000, 900, 20), (1010, 0, 21)])
def test_without_a_terminal_progress_is_about_twenty_lines_and_the_last(total, done, lines):
    shown, out = view()
    with shown.bar("PRIME", total, done) as advance:
        for step in range(done, total):
            advance(f"text {step}")
    written = out.getvalue().splitlines()
    assert len(written) == lines
    assert written[-1] == f"PRIME {total}/{total}  text {total - 1}"


def test_a_terminal_gets_a_bar():
    shown, out = view(terminal=True)
    with shown.bar("PRIME", 4, 1) as advance:
        advance("halfway")
    assert "2/4" in out.getvalue()
    assert "halfway" in out.getvalue()


def test_brackets_of_a_message_are_no_markup():
    shown, out = view()
    shown.say("[red]as it is[/red]")
    shown.warn("[bold]careful")
    assert out.getvalue() == "[red]as it is[/red]\nwarning: [bold]careful\n"


def test_negative_rewards_are_red_and_positive_ones_green():
    text = coloured(["a", "b", "c"], [-1.0, 0.0, 0.5])
    assert text.plain == "abc"
    assert [(span.start, span.end, span.style) for span in text.spans] == [
        (0, 1, "on rgb(110,0,0)"),
        (2, 3, "on rgb(0,55,0)"),
    ]
    assert not coloured(["a"], [0.0]).spans
    assert coloured([], []).plain == ""


def group(texts, outcomes):
    prompt = Prompt(id="0", text="1+1", tokens=(3, 6, 4), ability="arithmetic", reference="02")
    responses = tuple(
        Response(tokens=tuple(ids), logp=(0.0,) * len(ids), finished=False)
        for ids in (TOKENIZER(text, add_special_tokens=False)["input_ids"] for text in texts)
    )
    return Group(prompt=prompt, responses=responses, texts=tuple(texts), outcomes=tuple(outcomes))


def test_samples_are_a_right_and_a_wrong_response_with_their_own_rewards():
    groups = [group(["#1", "#02", "#3"], [0.0, 1.0, 0.5]), group(["1", "23"], [1.0, 0.0])]
    cu = torch.tensor([0, 2, 5, 7, 8, 10])
    rewards = ProcessRewards(token=torch.arange(10.0), logits=torch.zeros(5))
    found = token_samples(groups, rewards, cu, TOKENIZER)
    assert [("".join(s["pieces"]), s["outcome"], s["rewards"]) for s in found] == [
        ("#02", 1.0, [2.0, 3.0, 4.0]),
        ("#1", 0.0, [0.0, 1.0]),
        ("1", 1.0, [7.0]),
        ("23", 0.0, [8.0, 9.0]),
    ]
    assert token_samples(groups, None, cu, TOKENIZER)[0]["rewards"] is None


def test_samples_are_shown_with_and_without_rewards():
    shown, out = view()
    cu = torch.tensor([0, 2, 5])
    groups = [group(["#1", "#02"], [0.0, 1.0])]
    shown.samples("step 1", token_samples(groups, None, cu, TOKENIZER))
    assert "#02" in out.getvalue()
    assert "1.00" in out.getvalue()
    shown.samples("step 2", [])
    assert "step 2" not in out.getvalue()


def test_a_summary_shows_what_there_is():
    figures = {"accuracy/before_filter": 0.25, "throughput/tokens_per_s": 1234.0}
    assert step_summary(figures) == "accuracy 0.25  1234 tokens/s"
    figures |= {"prm/pairwise_accuracy": 0.75, "reward/right": 0.1, "reward/wrong": -0.1, "eval/greedy": 0.5}
    assert step_summary(figures) == (
        "accuracy 0.25  PRM 0.75  log-ratio right +0.100 wrong -0.100  held out: greedy 0.500  1234 tokens/s"
    )
