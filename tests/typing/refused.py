"""What a type checker refuses: each line is wrong in the way that its comment names, and an error less is an error."""

import torch
from torch import Tensor
from torch.distributions import Bernoulli

import scorefn as sf

p = Bernoulli(logits=torch.zeros(3, requires_grad=True))


def f(x: Tensor) -> Tensor:
    return x.sum(-1)


def refused() -> None:
    sf.expectation(p, f, "many")  # type: ignore[arg-type]
    sf.expectation(p, f)  # type: ignore[call-arg]
    sf.expectation(p, f, 8, baselin=None)  # type: ignore[call-arg]
    sf.expectation(p, f, 8, baseline="leave-one-out")  # type: ignore[arg-type]
    sf.expectation(p, f, 8, coupling=sf.LeaveOneOut())  # type: ignore[arg-type]
    sf.expectation(p, f, 8, credit=sf.Constant(0.0))  # type: ignore[arg-type]
    sf.expectation(torch.zeros(3), f, 8)  # type: ignore[arg-type]
    sf.surrogate(torch.zeros(3))  # type: ignore[arg-type]
    sf.draw(p, f, 8).fx = torch.zeros(8, 1)  # type: ignore[misc]
    sf.search.minimize(f, [0.0])  # type: ignore[call-arg]
    sf.search.SNES([0.0])  # type: ignore[call-arg]
    sf.posteriors.ScoreFunctionELBO(dependencies="guess")  # type: ignore[arg-type]
    print(sf.reinforce)  # type: ignore[attr-defined]
