"""The order of a generation: ties, failures, and what is handed out by rank."""

import math

import pytest
import torch

from scorefn.search.ranking import Ranking
from scorefn.shaping import nes_utilities, utilities_by_rank


@pytest.mark.parametrize(
    "values",
    [
        [3.0, 1.0, 2.0, -5.0],
        [1.0, 2.0, 2.0, 0.0, 0.0, 0.0, 5.0, 2.0, 7.0],
        [math.nan, 1.0, math.inf, 2.0, -math.inf, 1.0],
        [1e300, -1e300, 5e-324, 0.0, -0.0],
    ],
    ids=["distinct", "tied", "failed", "extreme"],
)
def test_what_is_handed_out_is_what_shaping_says(values):
    f = torch.tensor(values, dtype=torch.float64)
    torch.testing.assert_close(Ranking(f).hand_out(utilities_by_rank(len(f))), nes_utilities(-f), rtol=0, atol=1e-15)


def test_tables_of_several_columns_are_shared_column_by_column():
    ranking = Ranking(torch.tensor([2.0, 1.0, 2.0, 0.0], dtype=torch.float64))
    table = torch.tensor([[8.0, 1.0], [4.0, 2.0], [2.0, 3.0], [1.0, 4.0]], dtype=torch.float64)
    assert ranking.hand_out(table).tolist() == [[1.5, 3.5], [4.0, 2.0], [1.5, 3.5], [8.0, 1.0]]


def test_account_of_a_generation_with_failures():
    ranking = Ranking(torch.tensor([math.nan, 4.0, -1.0, math.inf, 2.0, -math.inf], dtype=torch.float64))
    assert (ranking.lowest, ranking.median, ranking.highest, ranking.failed) == (-1.0, 2.0, 4.0, 3)
    assert ranking.best == 2
    assert not ranking.flat
    assert ranking.values.tolist() == [math.inf, 4.0, -1.0, math.inf, 2.0, math.inf]


def test_the_median_of_an_even_number_is_the_lower_one():
    assert Ranking(torch.tensor([4.0, 1.0, 3.0, 2.0])).median == 2.0


@pytest.mark.parametrize(
    ("values", "flat"), [([1.0, 1.0], True), ([math.nan, math.inf], True), ([1.0, math.nan], False)]
)
def test_flat_means_that_nothing_is_better_than_anything(values, flat):
    assert Ranking(torch.tensor(values)).flat is flat


def test_nothing_but_failures():
    ranking = Ranking(torch.tensor([math.nan, -math.inf]))
    assert (ranking.failed, ranking.lowest, ranking.median, ranking.highest) == (2, math.inf, math.inf, -math.inf)
