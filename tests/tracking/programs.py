"""Two decisions and four values, with a leak by a pattern of code."""

import itertools
import warnings

import torch
from torch.distributions import Bernoulli

import scorefn as sf
from scorefn.tracking import EscapeWarning, Tracking
from tests.tracking.patterns import number

THETA = torch.tensor([0.4, -0.7], dtype=torch.float64)


def program(ledger, pattern, theta=THETA):
    """Two decisions and four values, of which `leaky` depends on the first by a pattern of code."""
    p, q = Bernoulli(logits=theta[0]), Bernoulli(logits=theta[1])
    z = ledger.decision("z", p.sample())
    w = ledger.decision("w", q.sample(), given=q.logits)
    ledger.value("of w", 2 * w - 0.5)
    leaky = ledger.value("leaky", pattern(z))
    ledger.value("later", w * 0.7 + 1)
    ledger.value("both", leaky * (w + 0.3))
    return torch.stack([p.log_prob(z), q.log_prob(w)]), [2 * w - 0.5, leaky, w * 0.7 + 1, leaky * (w + 0.3)]


def quietly(call):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = call()
    return result, [each for each in caught if each.category is EscapeWarning]


def tracked(pattern, **pinned):
    with Tracking({name: number(value) for name, value in pinned.items()}) as t:
        _, caught = quietly(lambda: program(t, pattern))
    return t, caught


def gradients(pattern, mask_of):
    """The exact gradient, and the expected estimate under the mask of each setting, by enumeration."""
    theta = THETA.clone().requires_grad_()
    exact = estimate = 0.0
    for z, w in itertools.product((0.0, 1.0), repeat=2):
        with Tracking({"z": number(z), "w": number(w)}) as t:
            (log_prob, values), _ = quietly(lambda: program(t, pattern, theta))
        fx = torch.stack([value.detach() for value in values])
        probability = log_prob.sum().exp()
        exact = exact + probability * fx.sum()
        draws = sf.Draws(x=torch.tensor([[z, w]]), log_prob=log_prob[None], fx=fx[None])
        estimate = estimate + probability.detach() * sf.surrogate(draws, credit=sf.Influence(mask_of(t))).sum()
    return [torch.autograd.grad(value, theta, retain_graph=True)[0] for value in (exact, estimate)]


def without_leak(t):
    return torch.tensor([[False, False, False, False], [True, False, True, True]])


EXACT = torch.tensor([[False, True, False, True], [True, False, True, True]])
