"""What advantages refuse, with its place."""

import math

import pytest
import torch

import scorefn as sf
from scorefn.trajectories import TemporalDifference, gae, vtrace
from tests.oracles.tolerances import near
from tests.trajectories.advantage_cases import DISCOUNT, Counting, brute_vtrace, steps, trajectories


@pytest.mark.parametrize("wrong", [-0.1, 1.01, math.nan, math.inf])
def test_fractions_outside_the_unit_interval(wrong):
    s = steps()
    for name, call in (
        ("discount", lambda: gae(*s.arguments, discount=wrong, lambda_=1.0)),
        ("lambda_", lambda: gae(*s.arguments, discount=1.0, lambda_=wrong)),
        ("discount", lambda: vtrace(*s.arguments, s.log_ratio, discount=wrong)),
        ("lambda_", lambda: vtrace(*s.arguments, s.log_ratio, discount=1.0, lambda_=wrong)),
        ("discount", lambda: TemporalDifference(Counting(), wrong)),
    ):
        with pytest.raises(sf.ScorefnError, match=rf"{name} must lie in \[0, 1\], but it is {wrong}"):
            call()


def test_tensors_that_do_not_fit():
    s = steps()
    with pytest.raises(sf.ShapeError, match=r"values has shape \(4, 6, 1\), but rewards .* \(4, 6\)"):
        gae(s.rewards, s.values.unsqueeze(-1), *s[2:5], discount=1.0, lambda_=1.0)
    with pytest.raises(sf.ShapeError, match=r"log_ratio has shape \(4, 5\)"):
        vtrace(*s.arguments, s.log_ratio[:, :5], discount=1.0)
    with pytest.raises(sf.ShapeError, match="T at least 1"):
        gae(*[v[:, :0] for v in s.arguments], discount=1.0, lambda_=1.0)
    with pytest.raises(sf.ScorefnError, match="done must be bool, but it is torch.float64"):
        gae(*s[:4], s.done.double(), discount=1.0, lambda_=1.0)


def test_bounds_of_vtrace():
    s = steps()
    for name in ("rho_bar", "c_bar"):
        with pytest.raises(sf.ScorefnError, match=rf"{name} must be above 0, but it is 0.0"):
            vtrace(*s.arguments, s.log_ratio, discount=1.0, **{name: 0.0})
    far = torch.full_like(s.rewards, 800.0)
    with pytest.raises(sf.NonFiniteError, match=r"exp\(800\).*finite values"):
        vtrace(*s.arguments, far, discount=1.0, rho_bar=math.inf, mask=s.mask)
    found = vtrace(*s.arguments, far, discount=1.0, mask=s.mask)
    assert near(found.targets, brute_vtrace(s._replace(log_ratio=far / 10), 1.0, 1.0, 1.0, 1.0)[0])


def changed(s, **fields):
    """The steps with one entry of each of some fields replaced, in step 3 of the second stream."""
    for name, value in fields.items():
        tensor = getattr(s, name).clone()
        tensor[1, 3] = value
        s = s._replace(**{name: tensor})
    return s


def estimates(s, mask=None):
    return [
        lambda: gae(*s.arguments, discount=0.9, lambda_=0.5, mask=mask),
        lambda: vtrace(*s.arguments, s.log_ratio, discount=0.9, mask=mask),
    ]


def test_a_step_that_terminates_without_an_end_is_refused_with_its_place():
    s = changed(steps(), terminated=True, done=False, mask=True)
    for estimate in estimates(s, s.mask):
        with pytest.raises(sf.ScorefnError, match=r"terminated is True but done is False in step 3 of stream 1.*\|"):
            estimate()
    for estimate in estimates(s, s.mask.index_put((torch.tensor(1), torch.tensor(3)), torch.tensor(False))):
        estimate()  # where there is no step, nothing is read


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("name", ["rewards", "values", "next_values"])
def test_what_is_not_finite_is_refused_with_its_place(name, value):
    s = changed(steps(), **{name: value}, terminated=False, done=False, mask=True)
    for estimate in estimates(s, s.mask):
        with pytest.raises(sf.NonFiniteError, match=rf"{name} are {value} in step 3 of stream 1"):
            estimate()


def test_a_log_ratio_may_be_infinite_but_not_nan():
    s = steps()
    assert s.mask[1, 2]
    vtrace(*s.arguments, s.log_ratio.index_put((torch.tensor(1), torch.tensor(2)), torch.tensor(-math.inf).double()),
           discount=1.0, mask=s.mask)  # fmt: skip
    s = changed(s, log_ratio=math.nan, mask=True, rewards=0.0, values=0.0, next_values=0.0)
    with pytest.raises(sf.NonFiniteError, match="log_ratio is nan in step 3 of stream 1"):
        vtrace(*s.arguments, s.log_ratio, discount=1.0, mask=s.mask)


def test_differences_that_overflow_say_so():
    big = torch.full((1, 2), 3e38)
    flag = torch.zeros(1, 2, dtype=torch.bool)
    with pytest.raises(sf.NonFiniteError, match="temporal differences overflow"):
        gae(big, -big, big, flag, flag, discount=1.0, lambda_=1.0)


def test_what_is_no_number_and_no_tensor():
    s = steps()
    for name in ("discount", "lambda_"):
        with pytest.raises(sf.ScorefnError, match=rf"{name} must be a number in \[0, 1\], but it is 'x'"):
            gae(*s.arguments, **{"discount": 1.0, "lambda_": 1.0, name: "x"})
    with pytest.raises(sf.ScorefnError, match="rho_bar must be above 0, but it is 'x'"):
        vtrace(*s.arguments, s.log_ratio, discount=1.0, rho_bar="x")
    with pytest.raises(sf.ShapeError, match=r"mask is a list, but it must be a tensor \[N, T\].*torch.as_tensor\(mask"):
        gae(*s.arguments, discount=1.0, lambda_=1.0, mask=s.mask.tolist())
    with pytest.raises(sf.ShapeError, match="rewards are a list"):
        gae(s.rewards.tolist(), *s.arguments[1:], discount=1.0, lambda_=1.0)


def test_value_functions_that_return_something_else():
    tau = trajectories()
    with pytest.raises(sf.ShapeError, match=r"shape \(20, 2\) for 20 observations.*\(20, 1\)"):
        TemporalDifference(lambda observations: observations, DISCOUNT)(tau)
    with pytest.raises(sf.ShapeError, match="a float for 20 observations"):
        TemporalDifference(lambda observations: 0.0, DISCOUNT)(tau)

    def broken(observations):
        return torch.where(torch.arange(len(observations)) == 4, torch.nan, observations[:, 0])

    with pytest.raises(sf.NonFiniteError, match="nan for step 5 of stream 0"):
        TemporalDifference(broken, DISCOUNT)(tau)
