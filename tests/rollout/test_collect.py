"""Collecting a batch: what is kept, what is dropped and why, and when to stop."""

from collections import Counter

import pytest

from prime_train.config.keys import Filter, Rollout, Verify
from prime_train.data.prompts import Stream, prompt_length
from prime_train.records import Prompt, Response
from prime_train.rollout.collect import collect, text_of
from prime_train.rollout.outcomes import Outcomes
from prime_train.run.interrupt import Interrupted
from prime_train.show import measures
from prime_train.verify import Verdict
from prime_train.verify.sandbox import SandboxUnavailable
from tests.support.tiny import EOS, TOKENIZER

K = 5


class Engine:
    """Answers every prompt with `#0` … `#4`, one of them cut off where the prompt says so."""

    def __init__(self):
        self.rounds, self.seeds = [], []

    def sample(self, prompts, *, n, temperature, max_tokens, seeds, progress):
        self.rounds.append(len(prompts))
        self.seeds.append(tuple(seeds))
        progress(1)
        made = []
        for prompt in prompts:
            texts = [TOKENIZER(f"#{k}", add_special_tokens=False)["input_ids"] for k in range(n)]
            cut = prompt[0] == TOKENIZER.convert_tokens_to_ids("9")
            made.append(
                [
                    Response(
                        tokens=tuple(text) if cut and k == 0 else (*text, EOS), logp=(0.0,) * (len(text) + 1),
                        finished=not (cut and k == 0),
                    )
                    for k, text in enumerate(texts)
                ]
            )  # fmt: skip
        return made


def right_answers(pairs):
    """A prompt's reference says how many of its K responses are right."""
    return [
        Verdict(id=prompt.id, score=float(int(text[1:]) < int(prompt.reference)), status="ok", seconds=0.0)
        for prompt, text in pairs
    ]


def prompt(number, right, cut=False):
    tokens = TOKENIZER("9" if cut else "1", add_special_tokens=False)["input_ids"]
    return Prompt(id=str(number), text="", tokens=tuple(tokens), ability="arithmetic", reference=str(right))


def collected(rights, *, wanted=4, filter=None, outcomes=right_answers, sampled=lambda tokens: None):
    """What is collected of prompts of which so many responses are right; a string says that one is cut off."""
    prompts = [prompt(i, int(right), isinstance(right, str)) for i, right in enumerate(rights)]
    stream = Stream(prompts, prompt_length, seed=0, max_tokens=10)
    engine = Engine()
    found = collect(
        Rollout(prompts=wanted, samples=K), filter or Filter(), stream, engine, outcomes, TOKENIZER, seed=7,
        sampled=sampled,
    )  # fmt: skip
    return found, engine, stream


def accuracies(found):
    return sorted(round(group.accuracy, 3) for group in found.groups)


def test_accuracies_on_the_filters_bounds_are_kept():
    found, *_ = collected([1, 2, 3, 4], wanted=4)
    assert accuracies(found) == [0.2, 0.4, 0.6, 0.8]
    assert not found.dropped


def test_too_easy_and_too_hard_prompts_are_dropped_and_said_so():
    found, _, _ = collected([0, 0, 0, 5, 5, 2, 3], wanted=7, filter=Filter(max_prompts=1))
    assert accuracies(found) == [0.4, 0.6]
    assert found.dropped == Counter({"too hard": 3, "too easy": 2})
    assert found.seen == 7
    assert found.accuracy == pytest.approx((10 + 5) / 35)


def test_sampling_goes_on_until_the_batch_is_full():
    found, engine, stream = collected([0, 0, 0, 0, 0, 0, 0, 2], wanted=3)
    assert accuracies(found) == [0.4] * 3
    assert len(engine.rounds) > 1
    assert len(set(engine.seeds)) == len(engine.seeds)
    assert found.seen == stream.position == sum(engine.rounds)
    assert found.seen == len(found.groups) + sum(found.dropped.values())


def test_a_batch_that_does_not_fill_is_returned_short_and_never_filled_with_what_failed():
    found, engine, _ = collected([0] * 30 + [5] * 30 + [2], wanted=4, filter=Filter(max_prompts=5))
    assert sum(engine.rounds) == found.seen == 20
    assert set(accuracies(found)) <= {0.4}
    assert len(found.groups) < 4
    assert measures.short_batch(found, 4).startswith(
        f"{len(found.groups)} of 4 prompts passed the filter, 20 were tried"
    )
    assert "too hard" in measures.short_batch(found, 4)


def test_nothing_kept_is_an_empty_batch():
    found, *_ = collected([0], wanted=2, filter=Filter(max_prompts=2))
    assert found.groups == ()
    assert found.dropped == Counter({"too hard": 4})
    assert measures.of_rollouts(found)["accuracy/after_filter"] == 0


def test_what_is_more_than_the_batch_is_surplus_and_counted():
    found, _, _ = collected([2] * 5 + [0] * 5, wanted=4)
    assert len(found.groups) == 4
    assert found.seen == 4 + sum(found.dropped.values())
    assert found.dropped["surplus"] == found.seen - 4 - found.dropped["too hard"]


def test_prompts_with_a_cut_off_response_are_dropped_only_where_asked_for():
    kept, *_ = collected([2, "2", 2, "2"], wanted=4)
    assert len(kept.groups) == 4
    assert kept.truncated == pytest.approx(2 / (4 * K))
    dropped, *_ = collected([2, "2", 2, "2"], wanted=4, filter=Filter(drop_truncated=True, max_prompts=1))
    assert len(dropped.groups) == 2
    assert dropped.dropped["truncated"] == 2


def test_a_filter_from_0_to_1_keeps_everything():
    found, *_ = collected([0, 5, 2], wanted=3, filter=Filter(low=0, high=1))
    assert accuracies(found) == [0, 0.4, 1]


def test_each_response_keeps_its_own_text_and_outcome():
    found, *_ = collected([2], wanted=1)
    [group] = found.groups
    assert group.texts == ("#0", "#1", "#2", "#3", "#4")
    assert group.outcomes == (1, 1, 0, 0, 0)


def test_verdicts_are_counted_by_status_and_an_error_scores_0():
    def failing(pairs):
        return [Verdict(id="", score=0.0, status="error" if text == "#0" else "ok", seconds=0.0) for _, text in pairs]

    found, *_ = collected([2, 2], wanted=2, filter=Filter(low=0), outcomes=failing)
    assert found.verdicts == Counter(error=2, ok=2 * (K - 1))
    figures = measures.of_rollouts(found)
    assert (figures["verify/error"], figures["verify/ok"]) == (2, 8)


def test_a_stop_between_two_rounds_comes_out_of_collect():
    def stop(tokens):
        raise Interrupted

    with pytest.raises(Interrupted):
        collected([2], sampled=stop)


def test_the_end_of_sequence_is_no_part_of_the_text():
    tokens = (*TOKENIZER("#1", add_special_tokens=False)["input_ids"], EOS)
    assert text_of(TOKENIZER, Response(tokens=tokens, logp=(0.0,) * 3, finished=True)) == "#1"
    assert text_of(TOKENIZER, Response(tokens=tokens[:2], logp=(0.0,) * 2, finished=False)) == "#1"


def test_generated_arithmetic_is_verified_without_any_process():
    with Outcomes(Verify()) as outcomes:
        verdicts = outcomes([(prompt(0, 15), "#15"), (prompt(1, 15), "#14")])
        assert outcomes._pool is None
    assert [(verdict.id, verdict.score, verdict.status) for verdict in verdicts] == [("0", 1, "ok"), ("1", 0, "ok")]


def test_answers_of_several_abilities_come_back_in_order_and_an_error_scores_0(tmp_path, monkeypatch):
    math = Prompt(id="m", text="", tokens=(1,), ability="math", reference="7")
    unknown = Prompt(id="u", text="", tokens=(1,), ability="poetry", reference="7")
    pairs = [(math, r"\boxed{7}"), (prompt(0, 15), "#15"), (unknown, "7"), (math, r"\boxed{8}")]
    with Outcomes(Verify(workers=1)) as outcomes:
        verdicts = outcomes(pairs)
    assert [verdict.score for verdict in verdicts] == [1, 1, 0, 0]
    assert [verdict.status for verdict in verdicts] == ["ok", "ok", "error", "ok"]


def test_a_verifier_of_ones_own_scores_every_ability_and_its_failures_score_0(tmp_path, monkeypatch):
    (tmp_path / "own_verifier.py").write_text(
        "def score(prompt, response):\n"
        "    if response == '#1':\n        raise RuntimeError('no')\n"
        "    return 2.0 if response == '#2' else 0.5\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    with Outcomes(Verify(workers=1, custom="own_verifier:score")) as outcomes:
        verdicts = outcomes([(prompt(0, 15), text) for text in ("#0", "#1", "#2")])
    assert [verdict.score for verdict in verdicts] == [0.5, 0, 0]
    assert [verdict.status for verdict in verdicts] == ["ok", "error", "error"]


def test_code_answers_without_a_sandbox_end_the_run_with_what_is_missing(monkeypatch):
    class NoSandbox:
        def verify(self, answers):
            return [
                Verdict(id=a.id, score=0.0, status="refused", seconds=0.0, detail="bwrap was not found")
                for a in answers
            ]

    problem = Prompt(id="c", text="Print 1.", tokens=(1,), ability="code", reference="{}")
    monkeypatch.setattr(Outcomes, "_verifiers", lambda self: NoSandbox())
    with Outcomes(Verify()) as outcomes, pytest.raises(SandboxUnavailable, match="bwrap was not found"):
        outcomes([(problem, "print(1)")])
