"""Problems in closed form or by quadrature: plain expectations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Bernoulli, Distribution, Independent, Normal

import scorefn as sf
from applications.benchmarks.reducers.variances import Estimate, Problem


def flat_gradient(value: Tensor, parameters: Sequence[Tensor], *, keep: bool = False) -> Tensor:
    """Of a scalar, all parameters in one vector."""
    return torch.cat([g.flatten() for g in torch.autograd.grad(value, parameters, retain_graph=keep)])


def plain(
    make: Callable[[], Distribution],
    f: Callable[[Tensor], Tensor],
    num_samples: int,
    parameters: Sequence[Tensor],
    *,
    coupling: Any = None,
    baseline: Any = "auto",
    control: Callable[[Distribution], Any] | None = None,
) -> Estimate:
    """``sf.expectation`` of a distribution that is made anew from its parameters; ``control`` is told which it is."""

    def estimate() -> Tensor:
        p = make()
        control_variate = None if control is None else control(p)
        value = sf.expectation(p, f, num_samples, coupling=coupling, baseline=baseline, control_variate=control_variate)
        return flat_gradient(value, parameters)

    return estimate


def pathwise(
    make: Callable[[], Distribution], f: Callable[[Tensor], Tensor], num_samples: int, parameters: Sequence[Tensor]
) -> Estimate:
    """The reparameterised gradient, which needs a differentiable f: what all this is compared with."""
    return lambda: flat_gradient(f(make().rsample((num_samples,))).mean(), parameters)


def learned(control: Any) -> Callable[[Callable[[], Distribution], Any, int, Sequence[Tensor]], Estimate]:
    """An estimate whose control variate is fitted to past draws."""

    def with_draws(make: Any, f: Any, num_samples: int, parameters: Sequence[Tensor]) -> Estimate:
        def estimate() -> Tensor:
            draws = sf.draw(make(), f, num_samples)
            value = sf.surrogate(control(draws), baseline=sf.LeaveOneOut()).mean()
            control.update(draws)
            return flat_gradient(value, parameters)

        return estimate

    return with_draws


def bernoulli(eta: float) -> Problem:
    """Three bits that share one logit, f quadratic: variances known by enumeration."""
    logit = torch.tensor(eta, dtype=torch.float64, requires_grad=True)
    target = torch.tensor([0.6, 0.51, 0.48], dtype=torch.float64)

    def make() -> Distribution:
        return Independent(Bernoulli(logits=logit.expand(3)), 1)

    def f(x: Tensor) -> Tensor:
        return (x - target).square().sum(-1)

    exact = flat_gradient(sf.diagnostics.exact_expectation(make(), f), [logit])
    value = sf.diagnostics.exact_expectation(make(), f).item()
    arguments = (make, f, 4, [logit])
    total = sf.LinearControlVariate(lambda x: x.sum(-1), lambda: 3 * logit.sigmoid(), coefficient=-0.06)
    return Problem(
        f"Bernoulli, logit {eta:g}",
        "Three bits share one logit, f = sum (b - (.6, .51, .48))^2, 4 draws. By enumeration, leave-one-out has "
        f"{'.0019875' if eta == 0 else '1.82276e-4'}.",
        {
            "leave-one-out": plain(*arguments),
            "no baseline": plain(*arguments, baseline=None),
            "Constant(E f)": plain(*arguments, baseline=sf.Constant(value)),
            "MovingAverage": plain(*arguments, baseline=sf.MovingAverage(0.9)),
            "OptimalConstant": plain(*arguments, baseline=sf.OptimalConstant()),
            "Antithetic": plain(*arguments, coupling=sf.Antithetic()),
            "Stratified": plain(*arguments, coupling=sf.Stratified()),
            "LinearControlVariate(sum x), c given": plain(*arguments, control=lambda p: total),
            "NaturalControlVariate": learned(sf.NaturalControlVariate(make))(*arguments),
        },
        {"the logit": slice(None)},
        lambda: (exact, 0.0),
        repeats=5,
    )


def gaussian() -> Problem:
    """f = x^2 under Normal(1, 1), in the mean: variances known in closed form."""
    mean = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)

    def make() -> Distribution:
        return Normal(mean, 1.0)

    arguments = (make, torch.square, 64, [mean])
    return Problem(
        "Gaussian",
        "d/dm of E x^2, x ~ Normal(m, 1) at m = 1, 64 draws. In closed form, variance x 64 is 30 without baseline, 18 "
        "with E f, 14 with the best constant, 4 pathwise: .469, .281, .219, .0625.",
        {
            "leave-one-out": plain(*arguments),
            "no baseline": plain(*arguments, baseline=None),
            "Constant(E f)": plain(*arguments, baseline=sf.Constant(2.0)),
            "MovingAverage": plain(*arguments, baseline=sf.MovingAverage(0.9)),
            "OptimalConstant": plain(*arguments, baseline=sf.OptimalConstant()),
            "LinearControlVariate(x)": plain(
                *arguments, control=lambda p: sf.LinearControlVariate(lambda x: x, lambda: p.mean)
            ),
            "pathwise, for comparison": pathwise(*arguments),
        },
        {"the mean": slice(None)},
        lambda: (torch.tensor([2.0], dtype=torch.float64), 0.0),
        repeats=5,
    )


def couplings() -> Problem:
    """A Gaussian in three dimensions and an f that is smooth and not additive."""
    mean = torch.tensor([0.5, -0.3, 0.2], dtype=torch.float64, requires_grad=True)
    log_scale = torch.tensor([0.0, -0.5, 0.3], dtype=torch.float64, requires_grad=True)

    def make() -> Distribution:
        return Independent(Normal(mean, log_scale.exp()), 1)

    def f(x: Tensor) -> Tensor:
        return nn.functional.softplus(x.sum(-1)) + 0.5 * (x - 1).square().sum(-1)

    parameters = [mean, log_scale]
    exact = flat_gradient(sf.diagnostics.exact_expectation(make(), f), parameters)
    arguments = (make, f, 256, parameters)
    coupled = {
        "Antithetic": sf.Antithetic(),
        "Stratified": sf.Stratified(),
        "Stratified(4)": sf.Stratified(4),
        "Systematic": sf.Systematic(),
        "Sobol": sf.Sobol(),
        "OrthogonalGaussian(2)": sf.OrthogonalGaussian(2),
        "OrthogonalGaussian(2, mirrored=True)": sf.OrthogonalGaussian(2, mirrored=True),
    }
    return Problem(
        "Couplings and control variates, Gaussian",
        "f = softplus(x_1 + x_2 + x_3) + |x - 1|^2 / 2 under a normal distribution with three means and three "
        "logarithms of scales, 256 draws; all with leave-one-out, which leaves out whole blocks. Exact gradient by "
        "quadrature.",
        {
            "independent draws": plain(*arguments),
            **{name: plain(*arguments, coupling=coupling) for name, coupling in coupled.items()},
            "OptimalConstant": plain(*arguments, baseline=sf.OptimalConstant()),
            "LinearControlVariate(x)": plain(
                *arguments, control=lambda p: sf.LinearControlVariate(lambda x: x, lambda: p.mean)
            ),
            "DeltaMethod": plain(*arguments, control=lambda p: sf.DeltaMethod(p, f)),
            "NaturalControlVariate": learned(sf.NaturalControlVariate(make))(*arguments),
            "pathwise, for comparison": pathwise(*arguments),
        },
        {"the means": slice(0, 3), "the scales": slice(3, 6)},
        lambda: (exact, 0.0),
    )
