"""Memorization statistics against hand-worked values, brute force and difflib."""

from __future__ import annotations

from difflib import SequenceMatcher

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from detectors.memorization import (
    exact_memorization,
    extraction_strength,
    longest_common_run,
    verbatim_overlap,
)

matches = st.lists(st.booleans(), min_size=1, max_size=40)
tokens = st.lists(st.integers(0, 3), max_size=15)


def test_exact_memorization():
    assert exact_memorization([True, False, True, True]) == 0.75
    assert exact_memorization(np.array([0, 1])) == 0.5


@pytest.mark.parametrize(
    ("match", "strength"),
    [
        ([1, 1, 1, 1], 1.0),
        ([0, 1, 1, 1], 0.75),
        ([1, 0, 0, 1], 0.25),
        ([1, 1, 1, 0], 0.0),
        ([0, 0, 0, 0], 0.0),  # open-unlearning: 0.25
        ([1], 1.0),
        ([0], 0.0),
    ],
)
def test_extraction_strength_by_hand(match, strength):
    assert extraction_strength(match) == strength


@given(matches)
def test_extraction_strength_by_brute_force(match):
    shortest = next(k for k in range(len(match) + 1) if all(match[k:]))
    strength = extraction_strength(match)
    assert strength == pytest.approx(1 - shortest / len(match))
    assert 0 <= strength <= exact_memorization(match) + 1e-12


@given(matches)
def test_extraction_strength_differs_from_open_unlearning_only_at_its_floor(match):
    for k in range(len(match)):  # the reference reads k after the loop
        if all(match[k:]):
            break
    theirs = 1 - k / len(match)
    if match[-1]:
        assert extraction_strength(match) == pytest.approx(theirs)
    else:
        assert extraction_strength(match) == 0
        assert theirs == pytest.approx(1 / len(match))


def test_verbatim_overlap():
    assert verbatim_overlap([1, 2, 3, 4], [1, 2, 9, 4]) == 0.5
    assert verbatim_overlap([1, 2], [1, 2, 3, 4]) == 1.0
    assert verbatim_overlap([1, 2], []) == 0.0
    assert verbatim_overlap("naïve 東京", "naïve 東西") == pytest.approx(7 / 8)


def test_longest_run_survives_a_changed_first_token():
    reference, generated = list("the quick brown fox"), list("a quick brown fox!")
    assert verbatim_overlap(reference, generated) == 0.0
    assert longest_common_run(reference, generated) == pytest.approx(len(" quick brown fox") / 19)


def test_longest_run_edges():
    assert longest_common_run([1, 2, 3], [3, 1, 2]) == pytest.approx(2 / 3)
    assert longest_common_run([1], [1]) == 1.0
    assert longest_common_run([1, 2], []) == 0.0
    assert longest_common_run([1, 2], [3, 4]) == 0.0


@given(tokens.filter(len), tokens)
def test_overlaps_against_difflib(reference, generated):
    block = SequenceMatcher(None, reference, generated, autojunk=False).find_longest_match()
    run = longest_common_run(reference, generated)
    assert run == pytest.approx(block.size / len(reference))
    assert 0 <= verbatim_overlap(reference, generated) <= run <= 1
    assert longest_common_run(reference, reference) == verbatim_overlap(reference, reference) == 1


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda: exact_memorization([]), "match is empty"),
        (lambda: extraction_strength([]), "match is empty"),
        (lambda: extraction_strength([[True]]), "match must be 1-D"),
        (lambda: exact_memorization([-0.3, -1.2]), "match must hold booleans"),
        (lambda: verbatim_overlap([], [1]), "reference_tokens is empty"),
        (lambda: longest_common_run([], [1]), "reference_tokens is empty"),
    ],
)
def test_errors_name_the_argument(call, named):
    with pytest.raises(ValueError, match=named):
        call()
