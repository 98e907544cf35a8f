"""Programs of Pyro with an estimator at a site, and estimators whose own randomness is enumerated."""

import itertools
import math

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.poutine.runtime import _PYRO_STACK
from torch.nn.functional import one_hot

import scorefn as sf
from scorefn.estimators.estimator import Estimator
from tests.posteriors.enumeration import (
    Problem,
    Script,
    distance,
    exact_gradient,
    expected_gradient,
)
from tests.posteriors.problems import coin, number, observe, parameters

EXACT = 1e-10


def chosen(probabilities):
    """Which of several things happens: each of them in turn, where a script runs the program."""
    if (script := next((h for h in _PYRO_STACK if isinstance(h, Script)), None)) is None:
        return int(torch.multinomial(probabilities, 1))
    digit = script.given[len(script.digits)] if len(script.digits) < len(script.given) else 0
    script.digits.append(digit)
    script.bases.append(len(probabilities))
    script.log_prob = script.log_prob + probabilities[digit].detach().log()
    return digit


def all_orders(shape, device):
    """In place of ``random_order``: every order of each column, in turn."""
    orders = list(itertools.permutations(range(shape[0])))
    uniform = torch.full((len(orders),), 1 / len(orders), dtype=torch.float64)
    columns = [orders[chosen(uniform)] for _ in range(math.prod(shape[1:]))]
    return torch.tensor(columns).T.reshape(shape)


def base(p):
    while isinstance(p, torch.distributions.Independent):
        p = p.base_dist
    return p


class Mirror(Estimator):
    """One antithetic pair of coins u < p and 1 - u < p, by DisARM's formula: every draw is a draw of p."""

    evaluations = 2

    def sample(self, p):
        pairs = []
        for one in base(p).probs.detach().flatten():
            both, unequal = (2 * one - 1).clamp(min=0), torch.minimum(one, 1 - one)
            neither = (1 - 2 * one).clamp(min=0)
            pairs.append(((0, 0), (1, 1), (0, 1), (1, 0))[chosen(torch.stack([neither, both, unequal, unequal]))])
        return number(pairs).T.reshape(2, *base(p).probs.shape)

    def surrogate(self, p, x, fx):
        logits = base(p).logits
        sign = (x[0] - x[1]) * logits.detach().abs().sigmoid() / 2
        fx = fx.reshape(fx.shape + (1,) * (x.ndim - fx.ndim))
        score = (fx[0] - fx[1]) * sign * (logits - logits.detach())
        return fx.mean(0).reshape(p.batch_shape) + score.reshape(*p.batch_shape, -1).sum(-1)


class TopAndRest(Estimator):
    """The most probable value, always, and a draw of the others: two draws that are not alike, of unequal weight."""

    evaluations = 2

    def _parts(self, p):
        logits = base(p).logits
        top = one_hot(logits.argmax(-1), logits.shape[-1]).bool()
        return top, logits.log_softmax(-1)

    def sample(self, p):
        top, log_p = self._parts(p)
        rest = torch.where(top, 0.0, log_p.detach().exp()).reshape(-1, top.shape[-1])
        drawn = torch.tensor([chosen(row / row.sum()) for row in rest]).reshape(top.shape[:-1])
        return torch.stack([log_p.argmax(-1), drawn])

    def weights(self, p, x):
        first = self._parts(p)[1].detach().exp().amax(-1)
        return torch.stack([first, 1 - first])

    def surrogate(self, p, x, fx):
        _, log_p = self._parts(p)
        first, drawn = log_p.gather(-1, x.movedim(0, -1)).unbind(-1)
        other = 1 - first.exp()
        within = drawn - other.log()  # of the draw, given that it is none of the most probable
        return first.exp() * fx[0] + other * (fx[1].detach() * (within - within.detach()) + fx[1])


# ----------------------------------------------------------------------------------------------------- the programs


def plate_then_global(estimator):
    """Coins in a plate with parameters of their own; then a coin that depends on all of them."""
    slopes, top, weight = parameters(2, (), ())
    data = number([0.3, -1.0])

    def model():
        with pyro.plate("data", 2):
            z = coin("z", weight)
            pyro.sample("x", dist.Normal(z * weight, 1.0), obs=data)
        s = coin("s", z.sum(-1, keepdim=True) - 1)
        with pyro.plate("late", 2):
            pyro.sample("y", dist.Normal(s - weight * s * z, 1.0), obs=data)

    def guide():
        with pyro.plate("data", 2):
            z = coin("z", slopes, infer={"estimator": estimator})
        coin("s", top + slopes.sum() * z.sum(-1, keepdim=True))

    return Problem("plate, then global", [slopes, top, weight], model, guide, nesting=1)


def global_then_plate(estimator):
    """A coin that everything depends on; a coin before it, on which it does not depend."""
    first, top, slopes, weight = parameters((), (), 2, (), seed=3)
    data = number([0.3, -1.0])

    def model():
        a = coin("a", number(0.4))
        g = coin("g", a - weight)
        with pyro.plate("data", 2):
            z = coin("z", weight * g - 0.2)
            pyro.sample("x", dist.Normal(z + a + weight * g, 1.0), obs=data)

    def guide():
        coin("a", first)
        g = coin("g", top, infer={"estimator": estimator})
        with pyro.plate("data", 2):
            coin("z", slopes + g)

    return Problem("global, then plate", [first, top, slopes, weight], model, guide, nesting=1)


def two(estimator):
    """Two sites that do not know each other, both with estimators; their values meet."""
    left, right, weight = parameters((), (), (), seed=4)

    def model():
        a, b = coin("a", number(0.4)), coin("b", weight)
        c = coin("c", a - b)
        observe("x", weight * a * b + b - c, 0.7)

    def guide():
        coin("a", left, infer={"estimator": estimator})
        coin("b", right - left, infer={"estimator": estimator})
        coin("c", left)

    return Problem("two", [left, right, weight], model, guide)


def categories(estimator):
    """Three values in a subsampled plate; a categorical outside of it depends on the plate."""
    table, top, weight = parameters((4, 3), 2, 3, seed=5)
    index, data = torch.tensor([1, 3]), number([0.3, -1.0, 1.4, 0.2])

    def model():
        with pyro.plate("data", 4, subsample=index):
            z = pyro.sample("z", dist.Categorical(logits=weight))
            pyro.sample("x", dist.Normal(weight[z.long()], 1.0), obs=data[index])

    def guide():
        with pyro.plate("data", 4, subsample=index):
            z = pyro.sample("z", dist.Categorical(logits=table[index]), infer={"estimator": estimator})
        s = (z == 1).double().sum(-1, keepdim=True)
        coin("s", top[0] + top[1] * s, infer={"is_auxiliary": True})

    return Problem("categories", [table, top, weight], model, guide, nesting=1)


def meeting(estimator):
    """One factor reads all elements of a plate."""
    table, weight = parameters((2, 3), 3, seed=6)

    def model():
        with pyro.plate("data", 2):
            z = pyro.sample("z", dist.Categorical(logits=weight))
        observe("x", weight[z.long()].sum(-1, keepdim=True).square(), 0.7)

    def guide():
        with pyro.plate("data", 2):
            pyro.sample("z", dist.Categorical(logits=table), infer={"estimator": estimator})

    return Problem("elements that meet", [table, weight], model, guide, nesting=1)


def events(estimator):
    """Two coins that are one joint decision in each row of nested plates, one of which is only the outer one's."""
    table, weight = parameters((2, 1, 2), (), seed=7)
    data = number([[0.3, -1.0]])

    def model():
        with pyro.plate("outer", 2, dim=-1), pyro.plate("rows", 1, dim=-2):
            z = pyro.sample("z", dist.Bernoulli(logits=weight).expand([2]).to_event(1))
            pyro.sample("x", dist.Normal(z.sum(-1) * weight + z[..., 0], 1.0), obs=data)

    def guide():
        with pyro.plate("outer", 2, dim=-1), pyro.plate("rows", 1, dim=-2):
            logits = table.permute(1, 0, 2)
            pyro.sample("z", dist.Bernoulli(logits=logits).to_event(1), infer={"estimator": estimator})

    return Problem("events", [table, weight], model, guide, nesting=2)


def masked(estimator):
    """A masked element costs nothing itself; a scale counts the other twice."""
    slopes, weight = parameters(2, (), seed=8)
    mask = torch.tensor([True, False])

    def model():
        with pyro.plate("data", 2), poutine.scale(scale=2.0):
            with poutine.mask(mask=mask):
                z = coin("z", number(0.4))
            pyro.sample("x", dist.Normal(weight * z, 1.0), obs=number([0.3, 1.4]))

    def guide():
        with pyro.plate("data", 2), poutine.mask(mask=mask), poutine.scale(scale=2.0):
            coin("z", slopes, infer={"estimator": estimator})

    return Problem("masked and scaled", [slopes, weight], model, guide, nesting=1)


COINS = [plate_then_global, global_then_plate, two, events, masked]
EVERY = [
    *itertools.product(COINS, [Mirror()]),
    *itertools.product([plate_then_global, global_then_plate, two, masked], [sf.Enumerate()]),
    *itertools.product([categories, meeting], [TopAndRest()]),
]


def named(value):
    return getattr(value, "__name__", type(value).__name__)


def error(problem, loss):
    """How far the expected gradient is from the exact one."""
    return distance(expected_gradient(problem, loss), exact_gradient(problem))
