"""`dice` against exact derivatives: chains and other influences, on- and off-policy, with and without baselines."""

import math

import pytest
import torch

import scorefn as sf

pytestmark = pytest.mark.usefixtures("float64")

CREDITS = {
    "total": lambda: sf.Total(),
    "reward to go": lambda: sf.RewardToGo(),
    "discounted": lambda: sf.RewardToGo(0.7),
    "chain": lambda: sf.Influence(torch.ones(2, 2, dtype=torch.bool).triu()),
    "diagonal": lambda: sf.Influence(torch.eye(2, dtype=torch.bool)),
    "full": lambda: sf.Influence(torch.ones(2, 2, dtype=torch.bool)),
}
INFLUENCE = {"diagonal": torch.eye(2), "total": torch.ones(2, 2), "full": torch.ones(2, 2)}


def every_pair_of_bits(theta):
    """All four outcomes of x_0 ~ Bern(theta_0), x_1 ~ Bern(theta_1 + theta_2 x_0), each with its log-probabilities."""
    x = torch.tensor([[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0]])
    logits = torch.stack([theta[0].expand(4), theta[1] + theta[2] * x[:, 0]], -1)
    return x, -torch.nn.functional.softplus(-(2 * x - 1) * logits)


def values(x, name):
    """Each value depends only on the decisions that may influence it."""
    if name == "diagonal":
        return torch.stack([2 + x[:, 0], x[:, 1] * 3 - 1], -1)
    later = 1.5 * x[:, 1] + x[:, 0] * x[:, 1] + 5
    first = 2 + x[:, 0]
    if name in ("total", "full"):
        first = first - 0.7 * x[:, 1]
    return torch.stack([first, later], -1)


def derivatives(value, theta):
    """All derivatives up to the third, flat."""
    found = [value.detach().reshape(1)]
    level = value.reshape(1)
    for _ in range(3):
        level = torch.cat([torch.autograd.grad(v, theta, create_graph=True)[0].reshape(-1) for v in level])
        found.append(level.detach())
    return found


@pytest.mark.parametrize("name", CREDITS)
@pytest.mark.parametrize("baseline", [None, sf.Constant(2.5), sf.Constant(torch.tensor([1.5, -4.0]))])
@pytest.mark.parametrize("behaviour", [False, True])
def test_every_derivative_is_exact(name, baseline, behaviour):
    """Each outcome is a draw, weighted by its probability under what was sampled: the mean is a sum over draws."""
    if name == "diagonal" and behaviour is False:
        theta = torch.tensor([0.4, -0.3, 0.0], requires_grad=True)  # independent: x_1 must not depend on x_0
        free = torch.tensor([1.0, 1.0, 0.0])
    else:
        theta = torch.tensor([0.4, -0.3, 0.8 if name != "diagonal" else 0.0], requires_grad=True)
        free = torch.tensor([1.0, 1.0, 0.0 if name == "diagonal" else 1.0])
    x, log_prob = every_pair_of_bits(theta * free)
    origin = every_pair_of_bits(torch.tensor([-0.2, 0.5, 0.3 * free[2]]))[1] if behaviour else None
    credit, fx = CREDITS[name](), values(x, name)
    probability = (log_prob.detach() if origin is None else origin).sum(-1).exp()
    draws = sf.Draws(x, log_prob, fx, credit, behaviour_log_prob=origin)
    if isinstance(baseline, sf.Constant) and torch.is_tensor(baseline.b) and name == "total":
        baseline = sf.Constant(baseline.b[:1])
    found = derivatives((probability * sf.dice(draws, baseline=baseline)).sum(), theta)
    weight = torch.tensor([1.0, 0.7 if name == "discounted" else 1.0])
    exact = derivatives((log_prob.sum(-1).exp() * (weight * fx).sum(-1)).sum(), theta)
    for order, (first, second) in enumerate(zip(found, exact, strict=True)):
        torch.testing.assert_close(first, second, rtol=1e-11, atol=1e-12, msg=lambda m, o=order: f"order {o}: {m}")
    assert all(level.abs().max() > 1e-3 for level in exact)
    # the surrogate has the same first derivative
    found = torch.autograd.grad((probability * sf.surrogate(draws, baseline=baseline)).sum(), theta)[0]
    torch.testing.assert_close(found, exact[1], rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("order", [1, 2, 3])
def test_a_constant_in_f_cancels_at_every_order_on_a_chain(order):
    """With b equal to the constant, each draw's derivatives of the constant part vanish, not only their mean."""
    theta = torch.tensor([0.4, -0.3, 0.8], requires_grad=True)
    x, log_prob = every_pair_of_bits(theta)
    draws = sf.Draws(x, log_prob, torch.tensor([[0.0, 3.0]]).expand(4, 2), sf.RewardToGo())
    estimate = sf.dice(draws, baseline=sf.Constant(3.0))
    for draw in estimate:
        level = draw.reshape(1)
        for _ in range(order):
            level = torch.cat([torch.autograd.grad(v, theta, create_graph=True)[0] for v in level])
        assert level.abs().max() < 1e-12


def test_the_box_by_hand():
    """One decision: the n-th derivative of box(l) f is f times the n-th derivative of exp(l - stop(l))."""
    theta = torch.tensor(0.4, requires_grad=True)
    log_prob = torch.sin(theta)
    draws = sf.Draws(torch.zeros(1), log_prob.reshape(1, 1), torch.tensor([[2.0]]))
    found = derivatives(sf.dice(draws).sum(), theta)
    s, c = math.sin(0.4), math.cos(0.4)
    right = [2.0, 2 * c, 2 * (c**2 - s), 2 * (c**3 - 3 * s * c - c)]
    torch.testing.assert_close(torch.cat(found), torch.tensor(right))


def test_surrogate_is_wrong_at_the_second_order():
    """Which is why dice exists."""
    theta = torch.tensor([0.4, -0.3, 0.8], requires_grad=True)
    x, log_prob = every_pair_of_bits(theta)
    draws = sf.Draws(x, log_prob, values(x, "full"), sf.RewardToGo())
    probability = log_prob.detach().sum(-1).exp()
    exact = derivatives((log_prob.sum(-1).exp() * values(x, "full").sum(-1)).sum(), theta)[2]
    naive = derivatives((probability * sf.surrogate(draws)).sum(), theta)[2]
    assert (naive - exact).abs().max() > 0.05
