"""The plug-in's own test: numbers worked out by hand, and the contract. `python -m pytest test_near_miss.py`"""

import pytest
import torch
from near_miss import RANK, NearMiss, nearness

from audit.instrument import load
from audit.quantities import View


def test_nearness_by_hand():
    assert nearness([0, 0]) == 1.0
    assert nearness([0, 1, 3]) == pytest.approx((1 + 1 / 2 + 1 / 4) / 3)
    with pytest.raises(ValueError, match="non-empty"):
        nearness([])


def test_the_rank_is_the_number_of_likelier_tokens():
    logits = torch.tensor([[3.0, 1.0, 2.0], [0.0, 5.0, 5.0]])
    view = View(logits, torch.tensor([1, 2]), {}, [(), ()], head=lambda x: x, norm=lambda x: x)
    assert RANK.compute(view)["rank"].tolist() == [2, 0], "a tie is no miss"


def test_it_is_found_by_its_name():
    assert isinstance(load("near-miss"), NearMiss)
