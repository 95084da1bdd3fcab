"""The plan loses nothing, repeats nothing, and never lets a scored token be predicted inside a shared prefix."""

from __future__ import annotations

from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from audit.plan import Batch, Generate, Input, Request, Work, merge, pack
from audit.quantities import MOMENTS, TOKEN, hidden, top_k
from audit.tokens import Tokens, common_prefix

QUANTITIES = (TOKEN, MOMENTS, top_k(3), hidden("blocks.0.hook_resid_post"))


@st.composite
def sequences(draw, most=24):
    """Ragged sequences, many of which share a beginning; some of one scored token, some of one token more."""
    ids = st.lists(st.integers(0, 3), min_size=1, max_size=12)
    beginnings = draw(st.lists(ids, min_size=1, max_size=4))
    made = []
    for _ in range(draw(st.integers(0, most))):
        whole = tuple(draw(st.sampled_from(beginnings)) * draw(st.integers(1, 2)) + draw(ids))
        start = draw(st.one_of(st.just(len(whole) - 1), st.integers(1, len(whole) - 1)))
        rivals = draw(st.sampled_from([(), (), (), (7,), (7, 8)])) if start == len(whole) - 1 else ()
        made.append(Tokens(whole, start, rivals))
    return made


@st.composite
def requests(draw):
    return [
        Request(f"r{i}", tuple(draw(sequences(8))), tuple(draw(st.sets(st.sampled_from(QUANTITIES), min_size=1))))
        for i in range(draw(st.integers(0, 4)))
    ]


@st.composite
def works(draw):
    return merge([Request("all", tuple(draw(sequences())), (TOKEN,))])


budgets = st.one_of(st.integers(1, 200), st.just(10**6))


def padded_tokens(batch: Batch) -> int:
    suffixes = [len(row.ids) - batch.prefix for row in batch.inputs]
    return len(suffixes) * max(suffixes) + batch.prefix * len(batch.groups)


# --- merge


@settings(max_examples=100)
@given(requests())
def test_merge_is_the_union_from_the_earliest_start_on(asked):
    names: dict[tuple, set[str]] = {}
    starts: dict[tuple, int] = {}
    for request in asked:
        for tokens in request.sequences:
            which = (tokens.ids, tokens.rivals)
            names.setdefault(which, set()).update(q.name for q in request.quantities)
            starts[which] = min(starts.get(which, 10**9), tokens.start)
    merged = merge(asked)
    assert len(merged) == len(names)
    assert {(w.tokens.ids, w.tokens.rivals): {q.name for q in w.quantities} for w in merged} == names
    assert {(w.tokens.ids, w.tokens.rivals): w.tokens.start for w in merged} == starts
    assert all([q.name for q in w.quantities] == sorted(q.name for q in w.quantities) for w in merged)


def test_merge_does_not_depend_on_who_asks_first_for_what():
    tokens = Tokens((1, 2, 3, 4), 3)
    early = Request("early", (Tokens((1, 2, 3, 4), 1),), (MOMENTS,))
    late = Request("late", (tokens,), (TOKEN,))
    assert merge([early, late]) == merge([late, early])
    assert merge([]) == []


def test_merge_keeps_rivals_at_their_position():
    ids = (1, 2, 3, 4, 5, 6)
    merged = merge([Request("a", (Tokens(ids, 5, (7,)),)), Request("b", (Tokens(ids, 2, (7,)),))])
    assert {work.tokens.start for work in merged} == {2, 5}


# --- pack


@settings(max_examples=150, deadline=None)
@given(works(), budgets, st.booleans(), st.sampled_from([0, 1, 5, 50, 10**6]))
def test_every_work_is_in_exactly_one_batch(wanted, budget, share, overhead):
    batches = pack(wanted, token_budget=budget, share=share, overhead=overhead)
    assert Counter(work for batch in batches for work in batch.works) == Counter(wanted)
    for batch in batches:
        assert batch.groups
        assert all(batch.groups)
        for row in batch.inputs:
            assert row.works
            assert all(work.tokens.ids[:-1] == row.ids for work in row.works)
        assert len(batch.works) == sum(len(row.works) for row in batch.inputs)


@settings(max_examples=150, deadline=None)
@given(works(), budgets, st.sampled_from([0, 5]))
def test_prefixes_are_shared_and_hold_nothing_that_is_scored(wanted, budget, overhead):
    for batch in pack(wanted, token_budget=budget, overhead=overhead):
        for group in batch.groups:
            assert len({row.ids[: batch.prefix] for row in group}) == 1
            assert (len(group) > 1) == (batch.prefix > 0)
        for row in batch.inputs:
            assert len(row.ids) > batch.prefix
        for work in batch.works:
            # The position that predicts the first scored token must be in the second pass.
            assert work.tokens.start - 1 >= batch.prefix


@settings(max_examples=150, deadline=None)
@given(works(), budgets, st.booleans())
def test_the_budget_holds_save_for_a_group_that_alone_exceeds_it(wanted, budget, share):
    for batch in pack(wanted, token_budget=budget, share=share):
        assert padded_tokens(batch) <= budget or len(batch.groups) == 1


@settings(max_examples=150, deadline=None)
@given(works(), budgets, st.sampled_from([0, 1, 5, 50]))
def test_sharing_never_costs_tokens(wanted, budget, overhead):
    plain = pack(wanted, token_budget=budget, share=False)
    shared = pack(wanted, token_budget=budget, overhead=overhead)
    assert sum(b.forward_tokens for b in plain) == sum(len(w.tokens.ids) - 1 for w in wanted)
    assert sum(b.forward_tokens for b in shared) <= sum(b.forward_tokens for b in plain)
    for batch in (*plain, *shared):
        assert batch.forward_tokens <= padded_tokens(batch)


@settings(max_examples=50, deadline=None)
@given(works(), budgets)
def test_the_same_works_give_the_same_batches(wanted, budget):
    assert pack(wanted, token_budget=budget) == pack(list(wanted), token_budget=budget)
    # What runs does not depend on the order in which it was asked for, only the order of equal lengths may.
    inputs = [row.ids for batch in pack(wanted, token_budget=budget) for row in batch.inputs]
    again = [row.ids for batch in pack(wanted[::-1], token_budget=budget) for row in batch.inputs]
    assert inputs == again


@settings(max_examples=50, deadline=None)
@given(works(), budgets, st.booleans())
def test_the_largest_batches_come_first_within_a_prefix_length(wanted, budget, share):
    longest: dict[int, int] = {}
    for batch in pack(wanted, token_budget=budget, share=share):
        width = max(len(row.ids) for row in batch.inputs)
        assert width <= longest.get(batch.prefix, width)
        longest[batch.prefix] = width


def test_the_options_of_a_question_compute_it_once():
    question = tuple(range(100, 150))
    one_token = [Tokens((*question, option), 50) for option in range(4)]
    [batch] = pack([Work(t, (TOKEN,)) for t in one_token], token_budget=10**6)
    assert [row.ids for row in batch.inputs] == [question]  # what is scored last never enters
    assert batch.forward_tokens == 50
    longer = [Tokens((*question, option, 8, 9), 50) for option in range(4)]
    [batch] = pack([Work(t, (TOKEN,)) for t in longer], token_budget=10**6)
    assert (batch.prefix, len(batch.inputs)) == (48, 4)  # 49 could be shared; lengths are multiples of four
    assert batch.forward_tokens == 48 + 4 * (52 - 48)
    assert [b.prefix for b in pack(batch.works, token_budget=10**6, overhead=72)] == [0]  # saves 3 x 48 = 2 x 72


def test_families_whose_prefixes_have_one_length_run_together():
    works = [Work(Tokens((*[q] * 8, o, o, o), 9), (TOKEN,)) for q in range(6) for o in range(10, 13)]
    [batch] = pack(works, token_budget=10**6)
    assert (batch.prefix, len(batch.groups), len(batch.inputs)) == (8, 6, 18)
    assert batch.forward_tokens == 6 * 8 + 18 * 2
    assert all(padded_tokens(b) <= 40 for b in pack(works, token_budget=40))


def test_a_short_beginning_in_common_is_not_paid_for_with_padding():
    """As with questions that all begin with `Question:`, and have answers of every length."""
    texts = [Tokens((1, 2, 3, 4, q, *[9] * length), 5) for q, length in enumerate(range(40, 400, 40), 10)]
    works = [Work(tokens, (TOKEN,)) for tokens in texts]
    for budget in (500, 10**6):
        shared, plain = (pack(works, token_budget=budget, share=share) for share in (True, False))
        assert sum(map(padded_tokens, shared)) <= sum(map(padded_tokens, plain))


def test_nothing_to_do():
    assert pack([], token_budget=100) == []
    assert pack([], token_budget=100, share=False) == []


def test_a_batch_lists_inputs_group_after_group_and_works_input_after_input():
    a, b = Work(Tokens((1, 2, 3), 2), (TOKEN,)), Work(Tokens((1, 2, 4), 2), (TOKEN,))
    c = Work(Tokens((5, 6), 1), (TOKEN,))
    batch = Batch(0, ((Input((1, 2), (a, b)),), (Input((5,), (c,)),)))
    assert batch.works == [a, b, c]
    assert [row.ids for row in batch.inputs] == [(1, 2), (5,)]
    assert batch.forward_tokens == 3
    assert common_prefix(a.tokens.ids, b.tokens.ids) == 2
    assert Generate("g", ((1,),), 4).new_tokens == 4
