"""Every path of model and guide, by forcing the guide's sites to prescribed values.

The exact bound uses Pyro's traces and autograd alone. The expected gradient runs a loss over
all joint values of all particles and weighs each gradient with the probability of what was forced: a finite sum.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer import ELBO
from pyro.poutine.messenger import Messenger
from torch import Tensor

import scorefn as sf
from scorefn.posteriors import ScoreFunctionELBO

NOISE = 0.7  # of every reparameterised draw


class Script(Messenger):
    """Gives the elements of every score-function site of the guide the digits of a number, 0 beyond its end."""

    def __init__(self, digits: list[int]) -> None:
        super().__init__()
        self.given, self.digits, self.bases, self.log_prob = digits, list[int](), list[int](), torch.zeros(())

    def _pyro_sample(self, msg: Any) -> None:
        fn = msg["fn"]
        if msg["done"] or msg["is_observed"] or type(fn).__name__ == "_Subsample":
            return
        if fn.has_rsample:
            msg["value"] = fn.mean + NOISE * fn.variance.sqrt()
        else:
            value = torch.zeros(fn.shape(), dtype=torch.float64)
            for index in range(value.numel()):
                digit = self.given[len(self.digits)] if len(self.digits) < len(self.given) else 0
                self.digits.append(digit)
                self.bases.append(_support_size(fn))
                value.view(-1)[index] = digit
            log_prob = fn.log_prob(value).sum()
            msg["value"] = value + torch.zeros_like(log_prob)  # as a draw does, it shows what its parameters came from
            self.log_prob = self.log_prob + log_prob
        msg["done"] = True


def _support_size(fn: Any) -> int:
    while hasattr(fn, "base_dist"):
        fn = fn.base_dist
    return len(fn.enumerate_support(expand=False))


def paths(run: Callable[[], Any]) -> Iterator[tuple[Tensor, Any]]:
    """The probability of each path and what ``run`` returned on it."""
    digits: list[int] = []
    while True:
        with Script(digits) as script:
            result = run()
        yield script.log_prob.exp(), result
        digits = script.digits
        while digits and digits[-1] == script.bases[len(digits) - 1] - 1:
            digits.pop()
        if not digits:
            return
        digits[-1] += 1


@dataclass(frozen=True, eq=False)
class Problem:
    """A model and a guide over plain float64 parameters."""

    name: str
    params: list[Tensor]
    model: Callable[[], Any]
    guide: Callable[[], Any]
    nesting: int = 0
    batched: bool = True  # whether particles can run together


def exact_bound(problem: Problem) -> Tensor:
    """``sum over paths of q (log p - log q)``."""

    def log_ratio() -> Tensor:
        guide_trace = poutine.trace(problem.guide).get_trace()
        model_trace = poutine.trace(poutine.replay(problem.model, trace=guide_trace)).get_trace()
        return model_trace.log_prob_sum() - guide_trace.log_prob_sum()

    return torch.stack([probability * value for probability, value in paths(log_ratio)]).sum()


@contextmanager
def same_store() -> Iterator[None]:
    """Pyro's param store as it is, and again afterwards."""
    store = pyro.get_param_store()
    state = store.get_state()
    copies = {name: value.detach().clone().requires_grad_() for name, value in state["params"].items()}
    with store.scope({"params": copies, "constraints": dict(state["constraints"])}):
        yield


def exact_gradient(problem: Problem) -> list[Tensor]:
    """Its gradient."""
    return _gradient(exact_bound(problem), problem)


def expected_gradient(problem: Problem, elbo: ELBO) -> list[Tensor]:
    """Expectation of the gradient of ``-elbo.differentiable_loss``, over everything that the particles may draw.

    Every path meets the loss, and Pyro's param store, in the state in which they are given.
    """
    total = [torch.zeros_like(param) for param in problem.params]

    def loss() -> Tensor:
        with same_store():
            return copy.deepcopy(elbo).differentiable_loss(problem.model, problem.guide)

    for probability, value in paths(loss):
        for index, gradient in enumerate(_gradient(-value, problem)):
            total[index] += probability.detach() * gradient
    return total


def second_derivative_error(problem: Problem, baseline: Any = None) -> float:
    """The Hessian times a fixed vector: expectation of ``dice`` against the bound's."""

    def product(value: Tensor) -> list[Tensor]:
        gradient = torch.autograd.grad(value, problem.params, create_graph=True, materialize_grads=True)
        slopes = [(g * torch.linspace(0.5, 1.5, g.numel()).reshape(g.shape).to(g)).sum() for g in gradient]
        return _gradient(torch.stack(slopes).sum(), problem)

    loss = ScoreFunctionELBO(max_plate_nesting=problem.nesting)
    total = [torch.zeros_like(param) for param in problem.params]
    for probability, draws in paths(lambda: loss.draws(problem.model, problem.guide)):
        for index, part in enumerate(product(sf.dice(draws, baseline=baseline).mean(0))):
            total[index] += probability.detach() * part
    return distance(total, product(exact_bound(problem)))


def _gradient(value: Tensor, problem: Problem) -> list[Tensor]:
    return list(torch.autograd.grad(value, problem.params, allow_unused=True, materialize_grads=True))


def distance(first: list[Tensor], second: list[Tensor]) -> float:
    return max(float((a - b).abs().max()) for a, b in zip(first, second, strict=True))
