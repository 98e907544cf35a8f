"""Refusals that another one stands behind: the first to speak names the repair."""

import pytest
import torch
from torch.distributions import Normal, Uniform

import scorefn as sf
from scorefn.core import evaluate, joint_log_prob


def fields(**given):
    """Draws of 3, with 2 decisions and 2 values."""
    usual = {"x": torch.zeros(3), "log_prob": torch.zeros(3, 2, requires_grad=True), "fx": torch.ones(3, 2)}
    return sf.Draws(**usual | given)


def test_log_probabilities_without_an_axis_of_decisions_are_refused():
    with pytest.raises(sf.ShapeError, match=r"log_prob must be \[N, \*B, K\].*\(3,\)"):
        fields(log_prob=torch.zeros(3, requires_grad=True), fx=torch.ones(3))


def test_values_without_an_axis_of_their_own_are_told_how_to_get_one():
    with pytest.raises(sf.ShapeError, match=r"unsqueeze\(-1\)"):
        fields(fx=torch.ones(3))


def test_no_values_at_all_are_told_to_be_one():
    with pytest.raises(sf.ShapeError, match=r"fx has shape \(3, 0\).* asks for \(3, 1\)"):
        fields(fx=torch.ones(3, 0))


@pytest.mark.parametrize(
    ("dtype", "repair"), [(torch.complex64, r"fx\.real"), (torch.float64, r"fx\.to\('cpu', torch\.float32\)")]
)
def test_another_dtype_is_told_how_to_become_the_right_one(dtype, repair):
    with pytest.raises(sf.ScorefnError, match=repair):
        fields(fx=torch.ones(3, 2, dtype=dtype))


def test_a_trailing_one_behind_a_batch_is_told_to_go():
    with pytest.raises(sf.ShapeError, match=r"squeeze\(-1\)"):
        joint_log_prob(torch.zeros(4, 3), torch.zeros(4, 3, 1))


def test_a_list_of_tensors_that_require_grad_is_told_to_be_stacked():
    theta = torch.zeros(3, requires_grad=True)
    with pytest.raises(sf.ScorefnError, match=r"torch\.stack"):
        evaluate(lambda x: [theta[0], theta[1], theta[2]], torch.zeros(3), torch.zeros(3))


def test_a_list_of_complex_numbers_is_refused():
    with pytest.raises(sf.ScorefnError, match="one real number per draw"):
        evaluate(lambda x: [1j, 2j, 3j], torch.zeros(3), torch.zeros(3))


@pytest.mark.parametrize("name", ["sample", "log_prob"])
def test_half_a_measure_is_refused(name):
    half = type("Half", (), {name: getattr(Normal(0.0, torch.ones((), requires_grad=True)), name)})()
    with pytest.raises(sf.ScorefnError, match="is not a measure"):
        sf.expectation(half, lambda x: x, 4)


def test_a_plain_measure_refuses_any_credit_before_f_is_called():
    called = []
    p = Normal(torch.zeros((), requires_grad=True), 1.0)
    with pytest.raises(sf.ShapeError, match="Leave credit out"):
        sf.expectation(p, lambda x: called.append(x) or x, 4, credit=sf.Total())
    assert not called


def test_the_credit_of_the_draws_must_fit_them():
    with pytest.raises(sf.ShapeError, match="2 decisions and 3 values"):
        sf.surrogate(fields(fx=torch.ones(3, 3), credit=sf.RewardToGo()))


def test_the_episodes_of_a_credit_must_fit_the_values():
    credit = sf.RewardToGo(done=torch.zeros(3, 1, dtype=torch.bool))
    with pytest.raises(sf.ShapeError, match=r"done \(3, 1\)"):
        sf.surrogate(fields(credit=credit))


def test_a_moving_support_is_no_matter_for_the_value_alone():
    p = Uniform(0.0, torch.ones((), requires_grad=True))
    with torch.no_grad():
        assert 0 <= sf.expectation(p, lambda x: x, 4) <= 1


# ----------------------------------------------------------------------------------------- f works on a copy of x


def test_f_works_on_a_copy_of_each_leaf():
    x = {"a": torch.ones(3), "name": "kept"}

    def f(given):
        given["a"].data.zero_()  # torch does not see this change
        return [1.0, 2.0, 3.0] if given["name"] == "kept" else None

    assert evaluate(f, x, torch.zeros(3)).tolist() == [1.0, 2.0, 3.0]
    assert torch.equal(x["a"], torch.ones(3))
