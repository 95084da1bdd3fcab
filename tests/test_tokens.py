"""Token sequences: what may be scored, and an address that two different sequences never share."""

from __future__ import annotations

import hashlib
import re
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from audit.tokens import Tokens, common_prefix, content_key

ids = st.lists(st.integers(0, 5), max_size=8).map(tuple)
any_ids = st.lists(st.integers(0, 2**40), max_size=5).map(tuple)


@pytest.mark.parametrize(("length", "start"), [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (2, 2), (5, -1), (5, 5), (5, 6)])
def test_something_must_be_scored_and_have_a_predecessor(length, start):
    with pytest.raises(ValueError, match="nothing to score"):
        Tokens(tuple(range(length)), start)


@given(st.integers(2, 30), st.data())
def test_scored_counts_the_tail(length, data):
    start = data.draw(st.integers(1, length - 1))
    tokens = Tokens(tuple(range(length)), start)
    assert tokens.scored == len(tokens.ids[tokens.start :]) >= 1


@given(any_ids, any_ids, any_ids, any_ids)
def test_the_key_tells_all_sequences_apart(a, rivals_a, b, rivals_b):
    same = (a, rivals_a) == (b, rivals_b)
    assert (content_key(a, rivals_a) == content_key(b, rivals_b)) == same
    assert re.fullmatch("[0-9a-f]{32}", content_key(a, rivals_a))


@given(ids, ids)
def test_the_key_does_not_confuse_ids_with_rivals(a, b):
    if b:
        assert content_key(a, b) != content_key(a + b)


def test_the_key_is_the_same_in_every_process_and_whatever_is_scored():
    assert Tokens((1, 2, 3), 1).key == Tokens((1, 2, 3), 2).key == content_key((1, 2, 3))
    assert content_key((1, 2, 3)) == hashlib.sha256(struct.pack("<4q", 3, 1, 2, 3)).hexdigest()[:32]
    assert Tokens((1, 2, 3), 2, (4,)).key != Tokens((1, 2, 3), 2).key


@given(ids, ids)
def test_common_prefix_by_its_definition(a, b):
    n = common_prefix(a, b)
    assert a[:n] == b[:n]
    assert n == min(len(a), len(b)) or a[n] != b[n]
