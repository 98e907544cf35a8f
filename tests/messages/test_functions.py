"""What f returns."""

import numpy as np
import pytest
import torch
from torch.distributions import Bernoulli, Independent

import scorefn as sf
from tests.messages.world import N, at, refuses


def test_the_fingerprint_sees_every_change(world):
    """The check above can fail."""
    before = world.bits()
    world.expectation(world.p, lambda x: x.sum(-1))
    assert world.bits() != before  # the baseline learned
    before = world.bits()
    world.expectation(world.p, lambda x: x.sum(-1), baseline=None)
    assert world.bits() == before
    world.theta.grad[0] += 1e-7
    assert world.bits() != before


def column(p, f):
    return lambda w: w.expectation(p(w), f)


def joint(w):
    return w.p


def single(w):
    return Independent(w.p, 1)


def no_numbers(x):
    return "high"


FUNCTIONS = [
    ("column", joint, lambda x: x.sum(-1, keepdim=True), sf.ShapeError, [r"\(8, 1\)", r"\(8, 3\)", "squeeze"]),
    ("column of one problem", single, lambda x: x[:, :1], sf.ShapeError, [r"\(8, 1\)", r"\(8,\)", "squeeze"]),
    ("scalar", joint, lambda x: x.sum(), sf.ShapeError, [r"shape \(\)", r"\(8, 3\)", r"never over the draws"]),
    ("number", joint, lambda x: 3, sf.ShapeError, [r"shape \(\)", r"\(8, 3\)"]),
    ("wrong batch", joint, lambda x: x[:, :2], sf.ShapeError, [r"\(8, 2\)", r"\(8, 3\)", "Independent"]),
    ("wrong N", joint, lambda x: x.sum(-1)[:4], sf.ShapeError, [r"\(4,\)", r"\(8, 3\)"]),
    ("transposed", joint, lambda x: x.T, sf.ShapeError, [r"\(3, 8\)", r"\(8, 3\)"]),
    ("too many axes", joint, lambda x: x[..., None], sf.ShapeError, [r"\(8, 3, 1\)", r"\(8, 3\)"]),
    ("event kept", single, lambda x: x, sf.ShapeError, [r"\(8, 3\)", r"\(8,\)", "Reduce|Independent"]),
    ("empty", joint, lambda x: torch.zeros(0), sf.ShapeError, [r"\(0,\)", r"\(8, 3\)"]),
    ("string", joint, no_numbers, sf.ScorefnError, ["str", "number"]),
    ("strings", joint, lambda x: ["a"] * N, sf.ScorefnError, ["list", "number"]),
    ("nothing", joint, lambda x: None, sf.ScorefnError, ["NoneType", "number"]),
    ("ragged", joint, lambda x: [[0.0]] * 7 + [[0.0, 1.0]], sf.ScorefnError, ["list", "number"]),
    ("complex", joint, lambda x: x.sum(-1) + 0j, sf.ScorefnError, ["complex64", "float32"]),
    ("float64", joint, lambda x: x.sum(-1).double(), sf.ScorefnError, ["float64", "float32", r"\.to\(|[Cc]onvert"]),
    ("one NaN", joint, lambda x: at([3], torch.nan), sf.NonFiniteError, [r"\bf\b", "nan", "1 of 8", r"\[3\]"]),
    ("infinite", joint, lambda x: at([0, 7], torch.inf), sf.NonFiniteError, ["inf", "2 of 8", r"\[0, 7\]"]),
    ("minus infinite", joint, lambda x: at([5], -torch.inf), sf.NonFiniteError, ["-inf", "1 of 8", r"\[5\]"]),
    ("in place", joint, lambda x: x.mul_(2).sum(-1), sf.ScorefnError, ["in place", "clone"]),
    ("in one place", joint, lambda x: x.index_fill_(0, torch.tensor(0), 1.0)[:, 0], sf.ScorefnError, ["in place"]),
]


@pytest.mark.parametrize(("p", "f", "error", "patterns"), [c[1:] for c in FUNCTIONS], ids=[c[0] for c in FUNCTIONS])
def test_f(world, p, f, error, patterns):
    refuses(world, column(p, f), error, *patterns)


def test_many_bad_draws_are_counted_and_the_first_are_named(world):
    def f(x):
        return at(range(5, 45), torch.nan, (50,))

    error = refuses(world, lambda w: w.expectation(w.p, f, 50), sf.NonFiniteError, "40 of 50", r"\[5, 6, .*14\] \.\.\.")
    assert "15" not in str(error)


def test_a_draw_that_is_bad_in_one_problem_is_named(world):
    def f(x):
        fx = torch.zeros(N, 3)
        fx[2, 1] = torch.inf
        return fx

    world.baseline = None if isinstance(world.baseline, sf.MovingAverage) else world.baseline
    refuses(world, lambda w: w.expectation(w.p, f), sf.NonFiniteError, "inf", "1 of 8", r"\[2\]")


@pytest.mark.parametrize("error", [KeyError("gone"), RuntimeError("diverged"), ZeroDivisionError("division by zero")])
def test_an_error_of_f_is_raised_as_it_is_with_the_shape_of_the_draws_as_a_note(world, error):
    def f(x):
        raise error

    before = world.bits()
    with pytest.raises(type(error)) as caught:
        world.expectation(world.p, f)
    assert world.bits() == before
    assert caught.value is error
    assert any("(8, 3)" in note for note in caught.value.__notes__)


def test_an_interrupt_is_left_alone(world):
    def f(x):
        raise KeyboardInterrupt

    before = world.bits()
    with pytest.raises(KeyboardInterrupt) as caught:
        world.expectation(world.p, f)
    assert world.bits() == before
    assert not getattr(caught.value, "__notes__", [])


@pytest.mark.parametrize(
    "answer",
    [
        lambda x: x.sum(-1).numpy(),
        lambda x: x.sum(-1).numpy().astype(np.float64),
        lambda x: x.sum(-1).tolist(),
        lambda x: tuple(x.sum(-1).tolist()),
        lambda x: x.sum(-1).int(),
        lambda x: x.sum(-1).long().tolist(),
        lambda x: x.sum(-1).to(torch.int8),
        lambda x: [v.sum() for v in x],
    ],
)
def test_numbers_of_any_kind_are_accepted(answer):
    theta = torch.tensor([0.3, -0.2, 0.1], requires_grad=True)

    def gradient(f):
        torch.manual_seed(1)
        value = sf.expectation(Bernoulli(logits=theta), f, N)
        return value.detach(), *torch.autograd.grad(value, theta)

    value, grad = gradient(lambda x: x.sum(-1))
    assert torch.equal(gradient(answer)[0], value)
    assert torch.equal(gradient(answer)[1], grad)


@pytest.mark.parametrize("answer", [lambda x: x[:, 0] > 0, lambda x: (x[:, 0] > 0).tolist()])
def test_bools_are_accepted(answer):
    theta = torch.tensor([0.3], requires_grad=True)
    value = sf.expectation(Bernoulli(logits=theta), answer, N)
    assert value.dtype == torch.float32
    assert torch.autograd.grad(value, theta)[0].isfinite().all()


def test_the_pathwise_part_of_listed_tensors_is_not_lost_silently():
    """`torch.as_tensor` detaches what it copies: either the gradient arrives or the call is refused."""
    theta, c = torch.tensor([0.3], requires_grad=True), torch.tensor(2.0, requires_grad=True)
    try:
        value = sf.expectation(Bernoulli(logits=theta), lambda x: [c * v.sum() + 1 for v in x], N)
    except (sf.ScorefnError, UserWarning):
        return
    assert torch.autograd.grad(value, c)[0] != 0
