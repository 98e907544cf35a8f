"""Inside `torch.func` transforms and `torch.compile`: the same numbers, the same refusals, no reading of values."""

import pytest
import torch
from torch.distributions import Bernoulli, Categorical, Normal, Uniform
from torch.func import grad, grad_and_value, jacrev, vmap

import scorefn as sf

N = 8
LOGITS = torch.tensor([0.1, 0.2, 0.3])
ROWS = torch.stack([LOGITS, -2 * LOGITS])


def f(x):
    return (x - 0.45).square().sum(-1)


def loss(logits, **options):
    return sf.expectation(Bernoulli(logits=logits), f, N, **options)


def cubed(logits, baseline=None):
    return sf.dice(sf.draw(Bernoulli(logits=logits), lambda x: x.sum(-1) ** 3, N), baseline=baseline).mean()


def seeded(call, *arguments):
    torch.manual_seed(3)
    return call(*arguments)


def autograd(call, logits):
    leaf = logits.clone().requires_grad_()
    value = seeded(call, leaf)
    return torch.autograd.grad(value, leaf)[0], value.detach()


# ------------------------------------------------------------------------------------------------ torch.func


@pytest.mark.parametrize("baseline", ["auto", None, sf.LeaveOneOut(), sf.Constant(0.5)])
def test_grad(baseline):
    def call(logits):
        return loss(logits, baseline=baseline)

    right = autograd(call, LOGITS)
    found = seeded(grad_and_value(call), LOGITS)
    torch.testing.assert_close(found, right, rtol=1e-6, atol=1e-7)


class Nodes:
    """A coupling that returns given draws, so that a loop over rows sees what vmap sees."""

    unbiased = True

    def sample(self, p, num_samples):
        return torch.arange(num_samples * 3).reshape(num_samples, 3).remainder(5).remainder(2).float(), None


def test_vmap_of_grad_is_a_loop_over_rows():
    def call(logits):
        return loss(logits, coupling=Nodes(), baseline=sf.Constant(0.4))

    found = vmap(grad(call))(ROWS)
    torch.testing.assert_close(found, torch.stack([autograd(call, row)[0] for row in ROWS]))
    assert (found[0] - found[1]).abs().min() > 1e-3


def test_grad_of_vmap_is_vmap_of_grad():
    one = seeded(vmap(grad(loss), randomness="different"), ROWS)
    other = seeded(grad(lambda rows: vmap(loss, randomness="different")(rows).sum()), ROWS)
    torch.testing.assert_close(one, other)


def test_jacrev():
    def problems(mean):
        return sf.expectation(Normal(mean, 1.0), lambda x: x**2, N)

    jacobian = seeded(jacrev(problems), LOGITS)
    right, _ = autograd(lambda mean: problems(mean).sum(), LOGITS)
    torch.testing.assert_close(jacobian, torch.diag(right))


@pytest.mark.parametrize("baseline", [None, sf.LeaveOneOut()])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_nested_grad_of_dice(order, baseline, float64):
    def call(t):
        return cubed(t * LOGITS.double(), baseline)

    nested = call
    for _ in range(order):
        nested = grad(nested)
    t = torch.tensor(0.7)
    leaf = t.clone().requires_grad_()
    level = seeded(call, leaf)
    for _ in range(order):
        (level,) = torch.autograd.grad(level, leaf, create_graph=True)
    torch.testing.assert_close(seeded(nested, t), level.detach(), rtol=1e-12, atol=1e-12)
    assert level.abs() > 1e-3


@pytest.mark.parametrize("verb", [sf.surrogate, sf.dice])
@pytest.mark.parametrize(
    "baseline", [sf.MovingAverage(), sf.ValueFunction(torch.nn.Linear(1, 1), lambda d: d.log_prob[..., None])]
)
def test_a_baseline_with_a_state_is_refused(baseline, verb):
    def call(logits):
        return verb(sf.draw(Bernoulli(logits=logits), f, N), baseline=baseline).mean()

    name = type(baseline).__name__
    with pytest.raises(sf.ScorefnError, match=f"{name}.*state.*LeaveOneOut"):
        grad(call)(LOGITS)
    with pytest.raises(sf.ScorefnError, match=f"{name}.*state.*LeaveOneOut"):
        grad(lambda logits: loss(logits, baseline=baseline))(LOGITS)
    if isinstance(baseline, sf.MovingAverage):
        assert repr(vars(baseline)) == repr(vars(sf.MovingAverage()))


@pytest.mark.parametrize(
    ("spoiled", "error"),
    [
        (lambda x: x.sum(), sf.ShapeError),
        (lambda x: x.sum(-1, keepdim=True), sf.ShapeError),
        (lambda x: x.sum(-1).double(), sf.ScorefnError),
        (lambda x: "high", sf.ScorefnError),
    ],
)
@pytest.mark.parametrize("transform", [grad, lambda call: vmap(grad(call), randomness="different")])
def test_refusals_that_need_no_values_remain(spoiled, error, transform):
    logits = LOGITS if transform is grad else ROWS
    with pytest.raises(error):
        transform(lambda logits: sf.expectation(Bernoulli(logits=logits), spoiled, N))(logits)
    with pytest.raises(sf.ScorefnError, match="num_samples"):
        transform(lambda logits: sf.expectation(Bernoulli(logits=logits), f, 0))(logits)


def test_a_moving_support_is_refused_inside_grad():
    with pytest.raises(sf.SupportError):
        grad(lambda high: sf.expectation(Uniform(torch.zeros(3), high), f, N))(LOGITS)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_values_are_not_read_so_that_a_nan_shows_as_a_nan(bad):
    found, value = grad_and_value(lambda t: sf.expectation(Bernoulli(logits=t), lambda x: f(x) * bad, N))(LOGITS)
    assert not value.isfinite()
    assert not found.isfinite().any()


def test_a_structured_measure_inside_grad():
    class Chain:
        def __init__(self, theta):
            self.theta = theta

        def draws(self, f, num_samples, *, coupling=None):
            p = Categorical(logits=self.theta)
            x = p.sample((num_samples, 4))
            return sf.Draws(x, p.log_prob(x), f(x), sf.RewardToGo(0.9))

    def call(theta):
        return sf.expectation(Chain(theta), lambda x: x.to(theta), N)

    torch.testing.assert_close(seeded(grad(call), LOGITS), autograd(call, LOGITS)[0])


# ------------------------------------------------------------------------------------------------ torch.compile

compiled = pytest.mark.filterwarnings("ignore")  # torch's compiler warns about itself


def numbers(call, logits):
    leaf = logits.clone().requires_grad_()
    value = seeded(call, leaf)
    return value.detach(), torch.autograd.grad(value, leaf)[0]


@compiled
@pytest.mark.parametrize(("backend", "rows"), [("eager", LOGITS), ("aot_eager", ROWS)])
def test_compiled(backend, rows):
    torch._dynamo.reset()

    def call(logits):
        return sf.expectation(Bernoulli(logits=logits), f, N).sum()

    for first, second in zip(numbers(torch.compile(call, backend=backend), rows), numbers(call, rows), strict=True):
        torch.testing.assert_close(first, second)


@compiled
@pytest.mark.parametrize("spoiled", [lambda x: f(x) * torch.nan, lambda x: torch.log(x.sum(-1) - 1)])
def test_compiled_nan_is_nan_or_refused(spoiled):
    torch._dynamo.reset()
    call = torch.compile(lambda t: sf.expectation(Bernoulli(logits=t), spoiled, N), backend="eager")
    try:
        value, found = numbers(call, LOGITS)
    except sf.NonFiniteError:
        return  # traced in pieces: the check ran
    assert not value.isfinite()
    assert not found.isfinite().any()


@compiled
def test_compiled_refusals():
    torch._dynamo.reset()
    for spoiled in (lambda x: x.sum(), lambda x: x.sum(-1, keepdim=True)):
        call = torch.compile(
            lambda t, spoiled=spoiled: sf.expectation(Bernoulli(logits=t), spoiled, N), backend="eager"
        )
        with pytest.raises(sf.ShapeError, match=r"\(8, 3\)"):
            numbers(call, LOGITS)
