"""What is given in the wrong place is refused in the words of the house, where it is given."""

from fractions import Fraction

import pytest
import torch

import scorefn as sf
from scorefn.scale import SeedRecord, WorkRecord
from scorefn.shaping import utilities_by_rank
from scorefn.trajectories import PerDecision, effective_sample_size, policy_change, sequence_draws


@pytest.mark.parametrize("mask", [[[1, 0]], [[True, False]], None, 1.0])
def test_an_influence_mask_that_is_no_tensor(mask):
    with pytest.raises(sf.ScorefnError, match=rf"bool tensor \[K, J\], but it is a {type(mask).__name__}: give"):
        sf.Influence(mask)


def test_a_policy_change_without_draws():
    logp = torch.tensor([[-1.0], [-2.0]], requires_grad=True)
    with pytest.raises(sf.ScorefnError, match="a Tensor and a Tensor: keep the draws"):
        policy_change(logp, logp)
    with pytest.raises(sf.ScorefnError, match="a Draws and a list"):
        policy_change(sequence_draws(logp, [1.0, 0.0]), [[-1.0], [-2.0]])


@pytest.mark.parametrize("ridge", ["a", None, True, 0.0, -1.0, float("nan"), float("inf"), 1j])
def test_a_ridge_that_is_no_positive_number(ridge):
    with pytest.raises(sf.ScorefnError, match="ridge must be a positive number, but it is"):
        sf.RegressionBaseline(ridge=ridge)


def test_a_ridge_may_be_any_positive_number():
    assert [sf.RegressionBaseline(ridge=r).ridge for r in (1, 0.5, Fraction(1, 4))] == [1.0, 0.5, 0.25]


@pytest.mark.parametrize(
    ("features", "said"),
    [(3, "features=3 is no features"), (torch.ones(2), "cannot be used as one"), (dict, "dict is a class")],
)
def test_features_that_cannot_be_called(features, said):
    with pytest.raises(sf.ScorefnError, match=said):
        sf.RegressionBaseline(features)


@pytest.mark.parametrize("record", [WorkRecord, SeedRecord])
def test_a_record_without_workers_or_with_negative_time(record):
    assert record(0, 20, 0.0, 0.0, 1, 0, 0, 0, 0).idle_share == 1
    assert record(0, 20, 0, 3.0, 1, 0, 0, 0, 0).idle_share == 0
    for workers in (0, -1, 1.5):
        with pytest.raises(sf.ScorefnError, match="workers must be an integer of at least 1, but it is"):
            record(0, 20, 0.0, 0.0, workers, 0, 0, 0, 0)
    for seconds, busy, name in ((-1.0, 0.0, "seconds"), (1.0, float("nan"), "busy")):
        with pytest.raises(sf.ScorefnError, match=f"{name} must be a time of at least 0"):
            record(0, 20, seconds, busy, 1, 0, 0, 0, 0)


@pytest.mark.parametrize("shape", [(), (0,), (0, 3)])
def test_the_effective_size_of_no_draws(shape):
    with pytest.raises(sf.ShapeError, match=r"must be \[N, ...\] with N of at least 1: no draws"):
        effective_sample_size(torch.zeros(shape))


@pytest.mark.parametrize(
    ("given", "said"),
    [([0.0, 1.0], "a list"), (PerDecision(), "a PerDecision"), (torch.zeros(3, dtype=torch.int64), "torch.int64")],
)
def test_the_effective_size_of_what_holds_no_log_ratios(given, said):
    with pytest.raises(sf.ScorefnError, match=f"tensor of floating point, .*, but it is .*{said}"):
        effective_sample_size(given)


def test_utilities_of_a_number_of_ranks_alone():
    assert torch.equal(utilities_by_rank(4, "cpu"), utilities_by_rank(4, torch.device("cpu")))
    for device in (4, torch.ones(2), True):
        with pytest.raises(
            sf.ScorefnError, match="device must be a torch.device or its name, but it is .*nes_utilities"
        ):
            utilities_by_rank(4, device)
    for num in (0, -1, 4.5, torch.ones(4)):
        with pytest.raises(sf.ScorefnError, match="num must be an integer of at least 1"):
            utilities_by_rank(num)
