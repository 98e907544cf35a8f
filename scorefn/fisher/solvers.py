"""The empirical Fisher information of any parameters, in sample space, and three ways to solve with it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from scorefn.core import NonFiniteError, ScorefnError
from scorefn.core.representation import representation
from scorefn.fisher.information import singular, solve_positive

FEW = 128
"""Backward passes that ``automatic`` spends at most on the matrix of scores."""
LARGE = 2**26
"""Numbers that the matrix of scores may have at most (256 MiB in float32)."""


class Scores:
    """The scores of R draws in P parameters, weighted so that ``F = S^T S``: an operator ``[R, P]``.

    Row n of S is ``sqrt(w_n / N) grad log p(x_n)``, the log-probabilities of all decisions of a draw summed. With B
    independent problems R = N B, and F is the sum over the problems. N is the divisor and nothing is centred, because
    E[score] = 0 is known.

    Args:
        log_prob: ``[R]``, differentiable in params.
        params: the tensors, P numbers in all.
        weight: ``w_n / N`` of each row, ``[R]``, not negative; ``w = 1`` on-policy.

    Raises:
        ScorefnError: log_prob does not depend on one of the params.

    Example:
        >>> import torch
        >>> from scorefn.fisher import Scores
        >>> logit = torch.tensor(0.0, requires_grad=True)
        >>> coin = torch.distributions.Bernoulli(logits=logit)
        >>> log_prob = coin.log_prob(torch.tensor([1.0, 0.0]))  # of scores 1/2 and -1/2
        >>> S = Scores(log_prob, (logit,), torch.full((2,), 0.5)).matrix()
        >>> S.T @ S  # p (1 - p)
        tensor([[0.2500]])
    """

    def __init__(self, log_prob: Tensor, params: tuple[Tensor, ...], weight: Tensor) -> None:
        self._params = params
        self._log_prob = weight.detach().sqrt() * log_prob
        self._seed = torch.zeros_like(self._log_prob, requires_grad=True)
        rows = torch.autograd.grad(self._log_prob, params, self._seed, create_graph=True, materialize_grads=True)
        self._pulled = torch.cat([row.reshape(-1) for row in rows])  # S^T seed, linear in the seed

    def __repr__(self) -> str:
        return f"Scores({list(self.shape)})"

    @property
    def shape(self) -> tuple[int, int]:
        """R and P."""
        return len(self._log_prob), len(self._pulled)

    @property
    def like(self) -> Tensor:
        """A tensor of the dtype and device of the scores."""
        return self._log_prob.detach()

    def times(self, vector: Tensor) -> Tensor:
        """S v, ``[P] -> [R]``: a second backward pass through the first."""
        return torch.autograd.grad(self._pulled, self._seed, vector, retain_graph=True, materialize_grads=True)[0]

    def transposed(self, vector: Tensor) -> Tensor:
        """S^T u, ``[R] -> [P]``: one backward pass."""
        rows = torch.autograd.grad(self._log_prob, self._params, vector, retain_graph=True, materialize_grads=True)
        return torch.cat([row.reshape(-1) for row in rows])

    def matrix(self) -> Tensor:
        """S, ``[R, P]``, in min(R, P) backward passes."""
        R, P = self.shape
        if R <= P:
            return torch.stack([self.transposed(unit) for unit in torch.eye(R).to(self._log_prob)])
        return torch.stack([self.times(unit) for unit in torch.eye(P).to(self._pulled)], 1)


class FisherSolver(Protocol):
    """How ``(F + damping I)^-1 g`` is found, given F's scores.

    Example:
        >>> import torch, scorefn as sf
        >>> class Diagonal:
        ...     '''As if the parameters had nothing to do with each other.'''
        ...
        ...     def __call__(self, scores, gradient, damping):
        ...         return gradient / (scores.matrix().square().sum(0) + damping)
        >>> logit, x = torch.tensor(0.0, requires_grad=True), torch.tensor([1.0, 0.0])
        >>> p = torch.distributions.Bernoulli(logits=logit)
        >>> draws = sf.Draws(x, p.log_prob(x)[:, None], x[:, None])
        >>> (natural,) = sf.natural_gradient(p, draws, params=logit, solver=Diagonal())
        >>> natural.round(decimals=5)  # 1/4 by 1/4
        tensor(1.)
    """

    def __call__(self, scores: Scores, gradient: Tensor, damping: float) -> Tensor:
        """The natural gradient ``[P]`` for a plain one ``[P]``."""
        ...


@dataclass(frozen=True)
class DenseSolve:
    """``(S^T S + damping I)^-1 g`` by a Cholesky factorisation, P x P: for few parameters and many draws.

    O(R P^2 + P^3), memory R P + P^2; in float64.

    Raises:
        ScorefnError: F + damping I is singular to rounding.

    Example:
        >>> import torch, scorefn as sf
        >>> logit, x = torch.tensor(0.0, requires_grad=True), torch.tensor([1.0, 0.0])
        >>> p = torch.distributions.Bernoulli(logits=logit)
        >>> draws = sf.Draws(x, p.log_prob(x)[:, None], x[:, None])
        >>> (natural,) = sf.natural_gradient(p, draws, params=logit, solver=sf.DenseSolve())
        >>> natural.round(decimals=5)  # 1/4 by 1/4
        tensor(1.)
    """

    def __call__(self, scores: Scores, gradient: Tensor, damping: float) -> Tensor:
        """``[P] -> [P]``.

        Raises:
            ScorefnError: F + damping I is singular to rounding.
        """
        rows = scores.matrix()
        S, rounding = rows.double(), 8 * rows.shape[1] * torch.finfo(rows.dtype).eps
        return solve_positive(S.mT @ S, gradient.double(), damping, least=rounding**2).to(gradient)


@dataclass(frozen=True)
class Woodbury:
    """``(g - S^T (S S^T + damping I)^-1 S g) / damping``, R x R: for few draws of many parameters.

    The identity of Woodbury (1950), "Inverting modified matrices". O(R^2 P + R^3), memory R P; in float64, because the
    difference loses as many digits as damping is smaller than F.

    Raises:
        ScorefnError: damping is 0, where F has directions that no draw moves along.

    Example:
        >>> import torch, scorefn as sf
        >>> logits = torch.zeros(50, dtype=torch.float64, requires_grad=True)
        >>> p = torch.distributions.Bernoulli(logits=logits)
        >>> draws = sf.draw(p, lambda x: x.sum(-1), 4)
        >>> solvers = sf.Woodbury(), sf.DenseSolve()  # of 4 x 4, and of 50 x 50
        >>> a, b = [
        ...     sf.natural_gradient(p, draws, params=logits, damping=0.1, solver=solver)[0]
        ...     for solver in solvers
        ... ]
        >>> torch.allclose(a, b)
        True
    """

    def __call__(self, scores: Scores, gradient: Tensor, damping: float) -> Tensor:
        """``[P] -> [P]``.

        Raises:
            ScorefnError: damping is 0.
        """
        if damping == 0:
            raise _undamped(scores)
        S, g = scores.matrix().double(), gradient.double()
        return ((g - S.mT @ solve_positive(S @ S.mT, S @ g, damping)) / damping).to(gradient)


@dataclass(frozen=True)
class ConjugateGradients:
    """``(S^T S + damping I) v = g`` by conjugate gradients: S is never formed, so that R and P may be large.

    Each iteration costs two backward passes and O(R + P) memory. g lies in the range of F, so that these equations
    never meet a direction in which F is singular: without damping a second system, with pseudo-random numbers on the
    right, looks for one, in about as many iterations again. Where ``max_iterations`` is given it is left out, and of a
    singular F the solution is the shortest one. Sources: Hestenes & Stiefel (1952); the use for natural gradients
    follows Martens (2020), section 8.

    Args:
        tolerance: stop when the residual is this small relative to g.
        max_iterations: stop after so many in any case, with what has been reached; None: converge or refuse.

    Raises:
        ScorefnError: a tolerance outside (0, 1), or max_iterations below 1; F is singular to rounding and damping 0.

    Example:
        >>> import torch, scorefn as sf
        >>> logits = torch.zeros(50, dtype=torch.float64, requires_grad=True)
        >>> p = torch.distributions.Bernoulli(logits=logits)
        >>> draws = sf.draw(p, lambda x: x.sum(-1), 4)
        >>> solvers = sf.ConjugateGradients(1e-9), sf.Woodbury()  # without S, and with it
        >>> a, b = [
        ...     sf.natural_gradient(p, draws, params=logits, damping=0.1, solver=solver)[0]
        ...     for solver in solvers
        ... ]
        >>> torch.allclose(a, b)
        True
    """

    tolerance: float = 1e-6
    max_iterations: int | None = None

    __repr__ = representation

    def __post_init__(self) -> None:
        """Refuse numbers that make no sense."""
        if not 0 < self.tolerance < 1 or (self.max_iterations is not None and self.max_iterations < 1):
            raise ScorefnError(
                f"{self!r} would never stop or never begin: tolerance must lie between 0 and 1, and max_iterations "
                "must be at least 1, or None to go on until the tolerance is met."
            )

    def __call__(self, scores: Scores, gradient: Tensor, damping: float) -> Tensor:
        """``[P] -> [P]``.

        Raises:
            ScorefnError: damping is 0 and F singular to rounding; there is no solution, or it was not reached.
        """
        R, P = scores.shape
        if damping == 0 and P > R:
            raise _undamped(scores)
        most = 10 * min(scores.shape) + 10 if self.max_iterations is None else self.max_iterations
        if damping == 0 and self.max_iterations is None and _has_still_direction(scores, most):
            raise _undamped(scores)
        solution, residual = torch.zeros_like(gradient), gradient.clone()
        direction, squared = residual.clone(), float(residual @ residual)
        goal = self.tolerance**2 * squared
        for _ in range(most):
            if squared <= goal:
                return solution
            image = scores.transposed(scores.times(direction)) + damping * direction
            curvature, length = float(direction @ image), float(direction @ direction)
            if not curvature > torch.finfo(gradient.dtype).eps * length * _scale(image, direction):
                raise _undamped(scores)
            step = squared / curvature
            solution, residual = solution + step * direction, residual - step * image
            before, squared = squared, float(residual @ residual)
            direction = residual + (squared / before) * direction
        if self.max_iterations is None and squared > goal:
            raise singular(
                f"Conjugate gradients reached a relative residual of {math.sqrt(squared / goal) * self.tolerance:.1e} "
                f"in {most} iterations, not {self.tolerance:.1e}: the Fisher information is singular to rounding"
            )
        return solution


def _has_still_direction(scores: Scores, most: int) -> bool:
    """Whether some direction moves no score, to rounding: conjugate gradients with a random right-hand side end there.

    By the Rayleigh quotients of the directions, which are never below the smallest eigenvalue. The units of the
    parameters are taken out by an estimate of the diagonal of F, so that the verdict is that of ``DenseSolve``; an F
    that is ill-conditioned only is passed.
    """
    R, P = scores.shape
    generator = torch.Generator().manual_seed(0)  # of its own: the global one is left alone
    signs = torch.randint(2, (4, R), generator=generator) * 2.0 - 1.0
    rows = [scores.transposed(sign) for sign in signs.to(scores.like)]
    diagonal = torch.stack(rows).square().mean(0)  # E[(S^T u)^2] is the diagonal for random signs u
    if not bool((diagonal > 0).all()):
        return True
    scale = diagonal.rsqrt()
    residual = torch.randn(P, generator=generator, dtype=torch.float64).to(scores.like)
    direction, squared = residual, float(residual @ residual)
    goal = (0.01 / math.sqrt(P)) ** 2 * squared  # a single direction holds about 1/P of it
    least, largest = (8 * P * torch.finfo(residual.dtype).eps) ** 2, 0.0
    for _ in range(most):
        if squared <= goal:
            return False
        moved = scores.times(scale * direction)
        curvature, length = float(moved @ moved), float(direction @ direction)
        largest = max(largest, curvature / length)
        if curvature <= least * largest * length:
            return True
        residual = residual - (squared / curvature) * (scale * scores.transposed(moved))
        before, squared = squared, float(residual @ residual)
        direction = residual + (squared / before) * direction
    return False


def _scale(image: Tensor, direction: Tensor) -> float:
    """The size of F along a direction."""
    return float(image.norm() / direction.norm())


def _undamped(scores: Scores) -> ScorefnError:
    R, P = scores.shape
    return singular(f"The empirical Fisher information of {R} draw(s) in {P} parameter(s) is singular")


def automatic(shape: tuple[int, int]) -> FisherSolver:
    """The solver for R draws and P parameters; see ``natural_gradient``."""
    R, P = shape
    if min(R, P) > FEW or R * P > LARGE:
        return ConjugateGradients()
    return DenseSolve() if P <= R else Woodbury()


def sample_weight(log_prob: Tensor, behaviour_log_prob: Tensor | None) -> Tensor:
    """``exp(sum_k log_prob - behaviour_log_prob)``, ``[N, *B, K] -> [N, *B]``: 1 on-policy."""
    if behaviour_log_prob is None:
        return torch.ones_like(log_prob[..., 0])
    weight = (log_prob.detach() - behaviour_log_prob).sum(-1).exp()
    if not bool(torch.isfinite(weight).all()):
        raise NonFiniteError(
            "An importance weight of the Fisher information overflows. The draws come from a distribution too far from "
            "the one that is differentiated: sample afresh, or nearer to it."
        )
    return weight
