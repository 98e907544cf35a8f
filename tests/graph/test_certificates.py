"""Exact certificates: every outcome of all draws is listed, and the expected gradient is that of the expectation."""

import pytest
import torch
from torch.distributions import Independent

import scorefn as sf
from tests.graph.choices import CHOOSER, Coin, Node, Pair

pytestmark = [pytest.mark.usefixtures("float64"), pytest.mark.filterwarnings("ignore::scorefn.tracking.EscapeWarning")]


def parameters(count=3, shape=()):
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(shape, generator=generator).requires_grad_() for _ in range(count)]


# Each program takes N and its parameters, and returns the graph and what it pays on average, by hand, [N, *B].


def chain(N, a, b, c, **site):
    with sf.StochasticGraph(N) as g:
        z = g.sample("z", Coin(logits=a), **site)
        h = g.sample("h", Coin(logits=b * z + c), **site)
        first, second = (z - 0.3) * c.exp(), (h - 0.4 * z).square() + z * b
        g.cost("first", first)
        g.cost("second", second)
    assert g.dependencies == {"first": ("z",), "second": ("z", "h")}
    return g, first + second


def fork(N, a, b, c):
    with sf.StochasticGraph(N) as g:
        z, w = g.sample("z", Coin(logits=a)), g.sample("w", Coin(logits=b + a))
        costs = z * 2 - c, (w - 0.2).square() * b, z * w + c
        for name, cost in zip(("of z", "of w", "of both"), costs, strict=True):
            g.cost(name, cost)
    assert g.dependencies == {"of z": ("z",), "of w": ("w",), "of both": ("z", "w")}
    return g, sum(costs)


def branch(N, a, b, c):
    """Python chooses the distribution; with several draws, for each of them."""
    with sf.StochasticGraph(N) as g:
        z = g.sample("z", Coin(logits=a))
        if N == 1:
            if z.item():
                h = g.sample("h", Coin(logits=b))
                cost = 1.5 * h + z
            else:
                cost = g.sample("k", Coin(logits=c)) * b
        else:
            h = g.sample("h", Coin(logits=torch.stack([b if each.item() else c for each in z])), given="z")
            cost = torch.stack([1.5 * y + x if x.item() else y * b for x, y in zip(z, h, strict=True)])
        g.cost("cost", cost)
    return g, cost


def loop(N, a, b, c):
    """Goes on while any draw is alive, at most three times."""
    with sf.StochasticGraph(N) as g:
        alive, total, t = torch.ones(N), torch.zeros(N), 0
        while alive.any() and t < 3:
            goes_on = g.sample(f"goes on[{t}]", Coin(logits=a + b * t))
            total = total + alive * (c * t + 1.0)
            alive = alive * goes_on
            t += 1
        g.cost("length", total.square())
    return g, total.square()


def nested(N, a, b, c):
    with sf.StochasticGraph(N) as g:
        z = g.sample("z", Coin(logits=a))
        h = g.sample("h", Coin(logits=b * z + c), num_samples=3)
        assert h.shape == (N, 3)
        costs = z * c, (h - 0.3) * (1 + z[:, None]) * b
        for name, cost in zip("12", costs, strict=True):
            g.cost(name, cost)
    assert g.dependencies == {"1": ("z",), "2": ("z", "h")}
    return g, costs[0] + costs[1].mean(1)


def nested_below(N, a, b, c):
    with sf.StochasticGraph(N) as g:
        z = g.sample("z", Coin(logits=a))
        h = g.sample("h", Coin(logits=b * z + c), num_samples=2)
        k = g.sample("k", Coin(logits=b - h + z[:, None]))
        costs = z * c, (h - 0.3) * (1 + z[:, None]) * b, (k - 0.2 * h).square()
        for name, cost in zip("123", costs, strict=True):
            g.cost(name, cost)
    assert g.dependencies == {"1": ("z",), "2": ("z", "h"), "3": ("z", "h", "k")}
    return g, costs[0] + costs[1].mean(1) + costs[2].mean(1)


def nested_root(N, a, b, c):
    """Reduced over the draws of the site by the program: no sibling is free of the others any more."""
    with sf.StochasticGraph(N) as g:
        z = g.sample("z", Coin(logits=a), num_samples=3)
        cost = (z.mean(1) - c).square() * b
        g.cost("cost", cost, given=())
    return g, cost


def nested_twice(N, a, b, c):
    with sf.StochasticGraph(N) as g:
        z = g.sample("z", Coin(logits=a), num_samples=2)
        h = g.sample("h", Coin(logits=b * z + c), num_samples=3)
        assert h.shape == (N, 2, 3)
        g.cost("cost", (h + z[..., None] - c).square())
    return g, (h + z[..., None] - c).square().mean((1, 2))


def batched(N, a, b, c):
    """Two problems, each with two coins that are one decision."""
    with sf.StochasticGraph(N) as g:
        z = g.sample("z", Coin(logits=torch.stack([a, a + b], -1)))
        h = g.sample("h", Coin(logits=z.sum(-1) * b + c))
        costs = (z[..., 0] * c + z[..., 1]).square(), h * b
        g.cost("first", costs[0])
        g.cost("second", costs[1])
    assert g.surrogate().shape == (N, 2)
    return g, costs[0] + costs[1]


def mixed(N, a, b, c):
    """Score and pathwise, each downstream of the other."""
    with sf.StochasticGraph(N) as g:
        z = g.sample("z", Coin(logits=a))
        e = g.sample("e", Node(b * z, c.exp()), pathwise=True)
        h = g.sample("h", Coin(logits=e + a))
        cost = (h - 0.3) * e + (e - z).square()
        g.cost("cost", cost)
    return g, cost


PROGRAMS = [chain, fork, branch, loop, nested, nested_below, nested_root, nested_twice, batched, mixed]


def settings():
    for program in PROGRAMS:
        for N in (1, 2):
            if (program, N) not in ((nested_below, 2), (nested_twice, 2), (batched, 2)):  # 2^12 outcomes
                yield pytest.param(program, N, id=f"{program.__name__}-{N}")


def of(program, **kwargs):
    return parameters(shape=(2,) if program is batched else (), **kwargs)


def expected(program, theta, **kwargs):
    """The expectation by the program's own arithmetic, differentiable to any order."""
    return sum(p * total.mean(0).sum() for p, (_, total) in CHOOSER.runs(lambda: program(1, *theta, **kwargs)))


def derivatives(value, theta, order):
    """Directional derivatives: every order along fixed directions, the last one in full."""
    found = []
    for k in range(order):
        gradient = torch.autograd.grad(value, theta, create_graph=True, materialize_grads=True)
        found.append(torch.cat([part.flatten() for part in gradient]))
        value = (found[-1] * torch.linspace(0.5, 1.5, len(found[-1])) * (-1) ** k).sum()
    return torch.cat(found).detach()


@pytest.mark.parametrize(("program", "N"), [*settings()])
def test_value_and_gradient_of_the_surrogate(program, N):
    theta = of(program)
    truth, value = expected(program, theta), 0.0
    for p, (g, total) in CHOOSER.runs(lambda: program(N, *theta)):
        surrogate = g.surrogate()
        torch.testing.assert_close(surrogate, total, atol=1e-12, rtol=0, check_layout=False)
        value = value + p.detach() * surrogate.mean(0).sum()
    assert abs(float((value - truth).detach())) < 1e-12
    assert (derivatives(value, theta, 1) - derivatives(truth, theta, 1)).abs().max() < 1e-10


@pytest.mark.parametrize(("program", "N"), [*settings()])
def test_three_derivatives_of_dice(program, N):
    theta = of(program)
    truth = expected(program, theta)
    value = sum(p.detach() * g.dice().mean(0).sum() for p, (g, _) in CHOOSER.runs(lambda: program(N, *theta)))
    assert (derivatives(value, theta, 3) - derivatives(truth, theta, 3)).abs().max() < 1e-9


@pytest.mark.parametrize("baseline", [None, sf.Constant(0.7), sf.LeaveOneOut(), sf.OptimalConstant()], ids=repr)
def test_baselines_of_a_site(baseline):
    theta = parameters()
    truth = derivatives(expected(chain, theta), theta, 1)
    runs = CHOOSER.runs(lambda: chain(2, *theta, baseline=baseline))
    value = sum(p.detach() * g.surrogate().mean(0) for p, (g, _) in runs)
    assert (derivatives(value, theta, 1) - truth).abs().max() < 1e-10


def weighed(N, a, b, c, estimator, second=None):
    """A coupled site between two that are scored, and a nested one below."""
    with sf.StochasticGraph(N) as g:
        u = g.sample("u", Coin(logits=c))
        z = g.sample("z", Independent(Coin(logits=torch.stack([a * u, b + u], -1)), 1), estimator=estimator)
        h = g.sample("h", Coin(logits=b * z.sum(-1) - c), num_samples=second)
        over = z.sum(-1) if second is None else z.sum(-1)[..., None]
        costs = u * c, (z[..., 0] - 0.4 * z[..., 1]).square() * a, (h - 0.3) * over + h * b
        for name, cost in zip("123", costs, strict=True):
            g.cost(name, cost)
    third = costs[2] if second is None else costs[2].mean(2)
    return g, (costs[0], costs[1] + third)


def root(N, a, b, c, estimator):
    with sf.StochasticGraph(N) as g:
        z = g.sample("z", Coin(logits=torch.stack([a, b])), estimator=estimator)
        h = g.sample("h", Coin(logits=z.sum(-1) * c))
        g.cost("cost", (h - 0.3) * z[..., 0] + z[..., 1] * b)
    return g, (h.new_zeros(()), (h - 0.3) * z[..., 0] + z[..., 1] * b)


def plain(program, theta, **kwargs):
    """The expectation with one draw in place of an estimator's."""

    class One(Pair):
        def sample(self, p):
            return p.sample(torch.Size((1,)))

        def weights(self, p, x):
            return torch.ones(1)

    runs = CHOOSER.runs(lambda: program(1, *theta, estimator=One(), **kwargs))
    return sum(p * (first + second.squeeze()).sum() for p, (_, (first, second)) in runs)


@pytest.mark.parametrize(
    ("program", "N", "estimator"),
    [
        pytest.param(weighed, 1, Pair(), id="weighed-1-pair"),
        pytest.param(weighed, 1, sf.Enumerate(), id="weighed-1-enumerate"),
        pytest.param(root, 1, Pair(), id="root-1-pair"),
        pytest.param(root, 1, sf.Enumerate(), id="root-1-enumerate"),
        pytest.param(root, 2, sf.Enumerate(), id="root-2-enumerate"),  # a pair has 2^12 outcomes there
    ],
)
def test_estimators_of_a_site(program, N, estimator):
    theta = parameters()
    truth = plain(program, theta)
    runs = CHOOSER.runs(lambda: program(N, *theta, estimator=estimator))
    value = sum(p.detach() * g.surrogate().mean(0) for p, (g, _) in runs)
    assert abs(float((value - truth).detach())) < 1e-12
    assert (derivatives(value, theta, 1) - derivatives(truth, theta, 1)).abs().max() < 1e-10


@pytest.mark.slow
def test_nested_draws_below_an_estimator():
    theta = parameters()
    truth = plain(weighed, theta)
    runs = CHOOSER.runs(lambda: weighed(1, *theta, estimator=Pair(), second=3))
    value = sum(p.detach() * g.surrogate().mean(0) for p, (g, _) in runs)
    assert (derivatives(value, theta, 1) - derivatives(truth, theta, 1)).abs().max() < 1e-10


@pytest.mark.parametrize(
    "estimator", [sf.DisARM(2), sf.ARMS(3), sf.LocalExpectation(), sf.SumAndSample(2, 1)], ids=repr
)
def test_an_estimator_of_the_only_site_is_itself(estimator):
    logits = torch.randn(3, 4).requires_grad_()
    p = Independent(torch.distributions.Bernoulli(logits=logits), 1)

    def f(x):
        return (x - 0.3).square().sum(-1) + x.prod(-1) * torch.arange(3.0)

    torch.manual_seed(5)
    direct = estimator(p, f)
    torch.manual_seed(5)
    with sf.StochasticGraph(1) as g:
        g.cost("cost", f(g.sample("x", p, estimator=estimator)))
    ours = g.surrogate()
    assert (ours[0] - direct).abs().max() < 1e-14
    gradients = [torch.autograd.grad(value.sum(), logits)[0] for value in (direct, ours)]
    assert (gradients[0] - gradients[1]).abs().max() < 1e-14
