"""Groups to packed tensors, packed tensors to micro-batches: nothing lost, nothing twice, nothing off by one."""

import random
from dataclasses import replace
from itertools import accumulate, pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AttentionInterface

from prime_train.algorithm.scoring import token_logp
from prime_train.models.distributed import World
from prime_train.models.language_model import idle, work_on_blocks
from prime_train.models.packing import Layout, micro_batches, pack, pack_sequences, step_end_tokens
from prime_train.records import Group, Prompt, Response
from tests.support.tiny import CPU, TOKENIZER, model, pairs

layouts = st.builds(Layout, budget=st.integers(1, 80), packed=st.booleans())


def sequence(sequences, s):
    """Tokens of one sequence, and how many of them are its response."""
    tokens = sequences.tokens[sequences.cu_tokens[s] : sequences.cu_tokens[s + 1]]
    return tokens, int(sequences.cu_responses[s + 1] - sequences.cu_responses[s])


@settings(max_examples=80, deadline=None)
@given(st.integers(1, 12), layouts, st.integers(0, 10**6), st.data())
def test_each_chosen_sequence_is_in_exactly_one_micro_batch(S, layout, seed, data):
    sequences = pack_sequences(pairs(S, seed))
    rows = data.draw(st.lists(st.sampled_from(range(S)), unique=True, min_size=1))
    found = micro_batches(sequences, torch.tensor(rows), layout, CPU)
    assert sorted(s for micro in found for s in micro.sequences.tolist()) == sorted(rows)
    of_rows = [t for s in rows for t in range(int(sequences.cu_responses[s]), int(sequences.cu_responses[s + 1]))]
    assert sorted(t for micro in found for t in micro.tokens.tolist()) == sorted(of_rows)


@settings(max_examples=80, deadline=None)
@given(st.integers(1, 12), layouts, st.integers(0, 10**6))
def test_a_micro_batch_is_what_naive_indexing_gives(S, layout, seed):
    sequences = pack_sequences(pairs(S, seed))
    for micro in micro_batches(sequences, torch.arange(S), layout, CPU):
        at, want_tokens = [], []
        begin = 0
        for row, s in enumerate(micro.sequences.tolist()):
            tokens, n = sequence(sequences, s)
            if not layout.packed:
                begin = row * micro.input_ids.shape[1]
            flat = micro.input_ids.flatten()
            assert torch.equal(flat[begin : begin + len(tokens)], tokens)
            if layout.packed:
                assert micro.position_ids[0, begin : begin + len(tokens)].tolist() == list(range(len(tokens)))
            at += range(begin + len(tokens) - n - 1, begin + len(tokens) - 1)
            want_tokens += tokens[-n:].tolist()
            assert micro.cu_seqlens[row + 1] - micro.cu_seqlens[row] == n
            begin += len(tokens)
        assert micro.at.tolist() == at
        assert micro.targets.tolist() == want_tokens
        assert micro.input_ids.shape[0] == (1 if layout.packed else len(micro.sequences))
        assert (micro.position_ids is None) != layout.packed
        assert (micro.cu_tokens is None) == (micro.longest is None) != layout.packed
        if layout.packed:
            lengths = [len(sequence(sequences, s)[0]) for s in micro.sequences.tolist()]
            assert micro.cu_tokens.dtype == torch.int32
            assert micro.cu_tokens.tolist() == [0, *accumulate(lengths)]
            assert micro.longest == max(lengths)


@settings(max_examples=80, deadline=None)
@given(st.integers(1, 12), layouts, st.integers(0, 10**6))
def test_the_budget_is_kept_except_by_what_is_alone_over_it(S, layout, seed):
    found = micro_batches(pack_sequences(pairs(S, seed)), torch.arange(S), layout, CPU)
    for micro in found:
        assert micro.input_ids.numel() <= layout.budget or len(micro.sequences) == 1


@settings(max_examples=80, deadline=None)
@given(st.integers(1, 12), layouts, st.integers(0, 10**6))
def test_there_are_no_more_micro_batches_than_filling_one_after_the_other_makes(S, layout, seed):
    sequences = pack_sequences(pairs(S, seed))
    lengths = sorted(sequences.cu_tokens.diff().tolist(), reverse=True)
    made = [[lengths[0]]]
    for length in lengths[1:]:
        if layout.fits([*made[-1], length]):
            made[-1].append(length)
        else:
            made.append([length])
    assert len(micro_batches(sequences, torch.arange(S), layout, CPU)) <= len(made)


@settings(max_examples=80, deadline=None)
@given(st.integers(1, 30), layouts, st.integers(2, 5), st.integers(0, 10**6))
def test_processes_share_the_sequences_in_equally_many_micro_batches(S, layout, size, seed):
    sequences, rows = pack_sequences(pairs(S, seed)), torch.arange(S)
    shares = [
        micro_batches(sequences, rows, replace(layout, world=World(rank=rank, size=size)), CPU) for rank in range(size)
    ]
    assert len({len(share) for share in shares}) == 1
    found = torch.cat([micro.sequences for share in shares for micro in share])
    assert sorted(found.tolist()) == rows.tolist()
    alone = micro_batches(sequences, rows, layout, CPU)
    assert len(shares[0]) == -(-len(alone) // size)


@pytest.mark.parametrize("packed", [False, True])
def test_micro_batches_that_run_at_the_same_time_cost_about_the_same(packed):
    rng = random.Random(0)
    lengths = [int(rng.lognormvariate(6, 0.7)) + 1 for _ in range(400)]
    sequences = pack_sequences(([5], [5] * length) for length in lengths)
    layout = Layout(budget=16384, packed=packed, pair_cost=1 / (12 * 1536))
    rounds = zip(
        *(
            micro_batches(sequences, torch.arange(400), replace(layout, world=World(rank=rank, size=4)), CPU)
            for rank in range(4)
        ),
        strict=True,
    )
    waited = spent = 0.0
    for together in rounds:
        costs = [layout.cost(sequences.cu_tokens.diff()[micro.sequences].tolist()) for micro in together]
        waited += sum(max(costs) - cost for cost in costs)
        spent += sum(costs)
    assert waited < 0.1 * spent


def test_an_empty_micro_batch_adds_nothing_to_loss_and_gradients():
    net = model()
    layout = Layout(budget=10**6, world=World(rank=1, size=2))
    [empty] = micro_batches(pack_sequences(pairs(1, 0)), torch.arange(1), layout, CPU)
    assert (len(empty.sequences), len(empty.tokens), empty.input_ids.numel()) == (0, 0, 1)
    loss = idle(net, empty)
    loss.backward()
    assert loss == 0
    assert all(p.grad is not None and not p.grad.any() for p in net.parameters())


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 5), st.integers(1, 4), layouts, st.integers(0, 10**6))
def test_units_stay_together(units, size, layout, seed):
    unit = torch.arange(units).repeat(size)
    found = micro_batches(pack_sequences(pairs(units * size, seed)), torch.arange(len(unit)), layout, CPU, units=unit)
    places = [set(unit[micro.sequences].tolist()) for micro in found]
    assert sum(map(len, places)) == units
    for micro, of in zip(found, places, strict=True):
        assert micro.input_ids.numel() <= layout.budget or len(of) == 1


def test_the_longest_sequence_comes_first():
    sequences = pack_sequences(pairs(10, seed=1))
    found = micro_batches(sequences, torch.arange(10), Layout(budget=30), CPU)
    widths = [micro.input_ids.shape[1] for micro in found]
    assert widths == sorted(widths, reverse=True)
    assert widths[0] == sequences.cu_tokens.diff().max()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_padded_and_packed_forwards_agree_to_rounding(attention):
    net, sequences = model(shape="16x2x2"), pack_sequences(pairs(9, seed=2))
    net.transformer.set_attn_implementation(attention)
    alone, _ = token_logp(net, sequences, Layout(budget=1))
    for packed in (False, True):
        found, _ = token_logp(net, sequences, Layout(budget=10**6, packed=packed))
        torch.testing.assert_close(found, alone, rtol=1e-5, atol=1e-6)


def test_attention_of_variable_lengths_is_told_where_packed_sequences_end():
    """Alone by what `transformers` hands to flash attention's varlen functions, with which it never looks at a device's
    position_ids."""
    told = []

    def varlen(module, query, key, value, attention_mask, *, scaling, **options):
        cuts, longest = options["cu_seq_lens_q"], options["max_length_q"]
        assert options["cu_seq_lens_k"] is cuts
        assert isinstance(longest, int)
        assert options["max_length_k"] == longest
        told.append((attention_mask, cuts.diff().tolist(), longest))
        parts = []
        for begin, end in pairwise(cuts.tolist()):
            q, k, v = (t[:, :, begin:end] for t in (query, key, value))
            parts.append(torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=scaling, is_causal=True))
        return torch.cat(parts, dim=2).transpose(1, 2), None

    AttentionInterface.register("varlen_for_tests", varlen)
    net, sequences = model(shape="16x2x2"), pack_sequences(pairs(9, seed=2))
    alone, _ = token_logp(net, sequences, Layout(budget=1))
    net.transformer.set_attn_implementation("varlen_for_tests")
    for blocks in ((), ("checkpoint",)):
        work_on_blocks(net.train(), blocks)
        found, _ = token_logp(net, sequences, Layout(budget=40, packed=True))
        torch.testing.assert_close(found, alone, rtol=1e-5, atol=1e-6)
    assert all(mask is None and longest == max(lengths) for mask, lengths, longest in told)
    assert sorted(length for _, lengths, _ in told[::2] for length in lengths) == sorted(
        2 * sequences.cu_tokens.diff().tolist()
    )
    [empty] = micro_batches(sequences, torch.arange(1), Layout(budget=9, packed=True, world=World(rank=1, size=2)), CPU)
    assert idle(net, empty) == 0


# -- groups to batches --


def group(number, responses, outcomes):
    prompt = Prompt(id=str(number), text="", tokens=(3, 6 + number, 4), ability="arithmetic", reference="0")
    made = tuple(
        Response(tokens=tuple(tokens), logp=tuple(-0.1 * i - number for i in range(len(tokens))), finished=True)
        for tokens in responses
    )
    return Group(prompt=prompt, responses=made, texts=("",) * len(made), outcomes=tuple(outcomes))


def test_a_batch_holds_every_response_of_every_group_in_order():
    groups = [group(0, [[7, 8, 2], [9, 2]], [1.0, 0.0]), group(1, [[5, 2]], [0.5])]
    found = pack(groups, TOKENIZER, None)
    assert found.sequences.tokens.tolist() == [3, 6, 4, 7, 8, 2, 3, 6, 4, 9, 2, 3, 7, 4, 5, 2]
    assert found.sequences.cu_tokens.tolist() == [0, 6, 11, 16]
    assert found.sequences.cu_responses.tolist() == [0, 3, 5, 7]
    assert found.outcomes.tolist() == [1.0, 0.0, 0.5]
    assert found.groups.tolist() == [0, 0, 1]
    assert found.sampler_logp.tolist() == pytest.approx([0, -0.1, -0.2, 0, -0.1, -1, -1.1])
    assert not found.step_ends.any()


def ends(text, pattern):
    """The characters that end a step, each followed by |."""
    tokens = TOKENIZER(text, add_special_tokens=False)["input_ids"]
    assert len(tokens) == len(text)
    found = step_end_tokens(tokens, TOKENIZER, pattern)
    return "".join(c + "|" * end for c, end in zip(text, found, strict=True))


def test_a_step_ends_with_the_token_that_completes_the_pattern_and_with_the_last_one():
    assert ends("1+2\n\n3+4\n\n#5", r"\n\s*\n") == "1+2\n\n|3+4\n\n|#5|"
    assert ends("1=1\n2=2\n", r"\n") == "1=1\n|2=2\n|"
    assert ends("1+2", r"\n") == "1+2|"


def test_a_pattern_that_matches_nothing_ends_no_step_of_its_own():
    assert ends("1+2", r"x*") == "1+2|"


def test_a_token_of_several_characters_ends_a_step_within_it():
    class Pieces:
        def batch_decode(self, tokens):
            return [["ab\n", "\nc", "de"][token] for [token] in tokens]

    assert step_end_tokens([0, 1, 2], Pieces(), r"\n\n") == [False, True, True]
