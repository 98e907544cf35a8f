"""What every joint estimator is: draws made together, and a surrogate with weights of its own."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor
from torch.distributions import Distribution, Independent

from scorefn.core import Integrand, NonFiniteError, PyTree, ScorefnError, ShapeError, evaluate, in_transform


class Estimator(ABC):
    """An estimate of E f from M draws made together: ``estimator(p, f) -> [*B]``, in two phases.

    ``sample(p)`` makes all draws, f is called once on them, and ``surrogate(p, x, fx)`` turns the values into a
    number whose value estimates E f and whose gradient estimates its gradient, the direct gradient of f included.
    Everything that the second phase needs is in x, so that an estimator keeps nothing between the two. A subclass
    gives the two phases and ``evaluations``; and ``weights``, where its draws do not count alike.

    Attributes:
        evaluations: M, how often f is evaluated for one estimate; None: it depends on the distribution, and M is the
            length of what ``sample`` returns.
        unbiased: whether value and gradient have no bias.
    """

    evaluations: int | None
    unbiased: bool = True

    @abstractmethod
    def sample(self, p: Distribution) -> Tensor:
        """All draws, ``[M, *batch, *event]``."""

    @abstractmethod
    def surrogate(self, p: Distribution, x: Tensor, fx: Tensor) -> Tensor:
        """The estimate, ``[*B]``, of values fx ``[M, *B]`` at x; B is a leading part of the batch shape of p."""

    def weights(self, p: Distribution, x: Tensor) -> Tensor:
        """``[M]`` or ``[M, *B]``, detached: the value of the surrogate is ``sum_k weights_k fx_k``; 1/M unless told.

        A subclass that leaves it at that makes draws that each follow p, independent from one problem to the next: a
        caller may then use any of them alone, or in any order.
        """
        return torch.full((len(x),), 1 / len(x), dtype=parameter(p).dtype, device=x.device)

    def outcomes(self, p: Distribution) -> tuple[Tensor, Tensor] | None:
        """All that ``sample(p)`` can return, ``[M, T, *batch, *event]``, and its probabilities ``[T]``, float64.

        None: they are not listed, because they are too many, or because the draws are made by ``p.sample`` alone, whose
        values a caller can list. A subclass that draws in another way may give them, so that its mean and variance are
        computed rather than sampled.
        """
        return None

    def __call__(self, p: Distribution, f: Integrand) -> Tensor:
        """Sample, call f once on all draws, and return the surrogate ``[*B]``.

        Args:
            p: one of the families that the estimator serves.
            f: x ``[M, *batch, *event]`` to ``[M, *B]``, with B a leading part of the batch shape of p; the batch
                dimensions beyond B belong to one joint draw, as in ``scorefn.draw``.

        Raises:
            ScorefnError: p is of another family.
            ShapeError: f returned another shape.
            NonFiniteError: f returned a NaN or an infinite value.
        """
        x = self.sample(p)
        return self.surrogate(p, x, evaluated(f, x, parameter(p), (len(x), *p.batch_shape)))


def evaluated(f: Integrand, x: PyTree, template: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Call f once on all draws: its values, refused where they are not finite or not one per draw and problem.

    Args:
        f: the integrand.
        x: the draws, a pytree with leading M.
        template: gives dtype and device to values that are no floating-point tensor.
        shape: ``(M, *batch)``, of which the shape of the values is a leading part.
    """
    fx = evaluate(f, x, template)
    if fx.is_complex():
        raise ScorefnError(f"f must return one real number per draw, but it returned {fx.dtype}: return its real part.")
    if not fx.is_floating_point():
        fx = fx.to(template.dtype)
    if fx.dtype != template.dtype or fx.device != template.device:
        raise ScorefnError(
            f"f returned {fx.dtype} on {fx.device}, but the distribution is {template.dtype} on {template.device}: "
            f"nothing is rounded or copied silently. Return f(x).to({template.dtype}), or make the parameters like f."
        )
    check_shape(fx, shape)
    if not in_transform() and not (finite := torch.isfinite(fx)).all():
        first = tuple((~finite).nonzero()[0].tolist())
        raise NonFiniteError(
            f"f is {fx[first].item()} at draw {first[0]} of {shape[0]}, which would make the whole gradient NaN. "
            "Nothing was updated. Clamp f, or exclude such points from the support."
        )
    return fx


def check_shape(fx: Tensor, shape: tuple[int, ...]) -> None:
    """Refuse values whose shape is no leading part of ``(M, *batch)``."""
    if fx.ndim == 0 or tuple(fx.shape) != shape[: fx.ndim]:
        raise ShapeError(
            f"f returned shape {tuple(fx.shape)} for {shape[0]} draws of a distribution with batch shape {shape[1:]}: "
            f"it must return one value per draw, [M, *B] with M = {shape[0]} and B a leading part of the batch shape. "
            "Reduce over the last dimensions only."
        )


def parameter(p: Distribution) -> Tensor:
    """A parameter of p, whose dtype and device its log-probabilities have."""
    unit = p
    while isinstance(unit, Independent):
        unit = unit.base_dist
    for value in vars(unit).values():
        if isinstance(value, Tensor) and value.is_floating_point():
            return value
        if isinstance(value, Distribution):
            return parameter(value)
    raise ScorefnError(f"{type(p).__name__} has no parameter that is a floating-point tensor, so no gradient either.")
