"""Leave-one-out of what the gradient of f at the other draws does not foretell."""

from __future__ import annotations

import math
from numbers import Real

import torch
from torch import Tensor
from torch.distributions import Bernoulli, Distribution, OneHotCategorical

from scorefn.core import NonFiniteError, ScorefnError, check_count, in_transform
from scorefn.estimators.estimator import Estimator, check_shape
from scorefn.estimators.finite import unwrapped
from scorefn.estimators.gradient import beside, with_gradient

_SERVED = "Bernoulli, OneHotCategorical, and Independent of these, whose values are numbers that f can be moved along"


class DoubleControlVariate(Estimator):
    """K independent draws with leave-one-out and the gradient of f as control variates.

    With ``g_j = grad f(x_j)`` and mu = E x, leave-one-out of what the slope at the other draws does not foretell::

        h_k = f(x_k) - alpha [1/(K - 1) sum_{j != k} g_j]^T (x_k - mu)
        1/K sum_k (h_k - 1/(K - 1) sum_{j != k} h_j) grad log p(x_k)  +  alpha (1/K sum_k g_k)^T grad mu

    The last term is the expectation of what is subtracted from f(x_k); what is subtracted from the other values has
    the mean 0 for any x_k, since ``E (x_j - mu) = 0``. alpha = 0 is leave-one-out; with alpha = 1 an f that is linear
    has no variance, but where f bends between the draws a smaller alpha is better, and the best one may be close to 0.
    The cost is that of leave-one-out, as long as the gradients of f in all draws cost no more than its values: one
    backward pass through f in ``surrogate``.

    f must be differentiable in a continuous extension: ``sample`` returns x that requires grad, and ``surrogate``
    differentiates fx with respect to it, so f computes with x as real numbers, in torch operations. Serves
    ``Bernoulli``, ``OneHotCategorical`` and ``Independent`` of these. Source: Titsias & Shi (2022), "Double control
    variates for gradient estimation in discrete latent variable models".

    Args:
        num_samples: K, at least 2.
        alpha: a finite number, the weight of the gradients; any constant leaves the estimate unbiased. The paper fits
            it during training.

    Raises:
        ScorefnError: num_samples is no integer of at least 2, alpha is no finite number, the distribution is of
            another family, or fx does not depend on x differentiably.
        ShapeError: fx is not ``[K, *B]``.
        NonFiniteError: the gradient of f is NaN or infinite.

    Example:
        >>> import torch
        >>> from scorefn import DoubleControlVariate
        >>> logits = torch.zeros(3, requires_grad=True)
        >>> p = torch.distributions.Bernoulli(logits=logits)
        >>> DoubleControlVariate(2)(p, lambda x: (x * torch.arange(3)).sum(-1)).backward()
        >>> logits.grad
        tensor([0.0000, 0.2500, 0.5000])
    """

    unbiased = True
    evaluations: int
    alpha: float

    def __init__(self, num_samples: int, alpha: float = 1.0):
        if check_count("num_samples", num_samples) < 2:
            raise ScorefnError(
                "num_samples=1 leaves no other draw to extrapolate from: DoubleControlVariate needs 2 or more. Use "
                "scorefn.expectation(p, f, 1) for a single draw."
            )
        if isinstance(alpha, bool) or not isinstance(alpha, Real) or not math.isfinite(alpha):
            raise ScorefnError(
                f"alpha must be a finite number, but it is {alpha!r}: 1 trusts the gradients, 0 does not."
            )
        self.evaluations = check_count("num_samples", num_samples)
        self.alpha = float(alpha)

    def __repr__(self) -> str:
        return f"DoubleControlVariate({self.evaluations}, alpha={self.alpha})"

    def sample(self, p: Distribution) -> Tensor:
        """Independent draws ``[K, *batch, *event]``, which require grad: f is differentiated with respect to them."""
        unit = unwrapped(p, type(self).__name__, (Bernoulli, OneHotCategorical), _SERVED)
        if in_transform():
            raise ScorefnError(
                "DoubleControlVariate differentiates f with respect to its draws, which a torch.func transform cannot "
                "trace. Take the gradient by backward() or torch.autograd.grad, or use scorefn.DisARM() there."
            )
        x: Tensor = unit.sample(torch.Size((self.evaluations,)))
        return x.requires_grad_(torch.is_grad_enabled())

    def surrogate(self, p: Distribution, x: Tensor, fx: Tensor) -> Tensor:
        """The mean of fx, ``[*B]``, with the gradient of the class; fx ``[K, *B]`` must come from x by autograd."""
        unit = unwrapped(p, type(self).__name__, (Bernoulli, OneHotCategorical), _SERVED)
        check_shape(fx, (self.evaluations, *p.batch_shape))
        value = fx.mean(0)
        if not torch.is_grad_enabled():
            return value
        slope = input_gradient(self, fx, x)
        logits: Tensor = unit.logits
        with torch.no_grad():
            others = self.evaluations - 1
            points, f = x.detach(), fx.detach()
            lead = tuple(range(fx.ndim, x.ndim))
            total, mean = slope.sum(0), unit.mean
            change = (total - slope) * (points - mean)
            f = f - self.alpha / others * (change.sum(lead) if lead else change)
            advantage = (self.evaluations * f - f.sum(0)) / others
            if isinstance(unit, Bernoulli):
                score, jacobian = points - mean, mean * (-logits).sigmoid()
            else:  # in the log-probabilities, through which the distribution is normalised
                score, jacobian = points, mean
            gradient = (beside(advantage, points) * score).sum(0) + self.alpha * total * jacobian
        return with_gradient(value, logits, gradient / self.evaluations)


def input_gradient(owner: object, fx: Tensor, x: Tensor, create_graph: bool = False) -> Tensor:
    """The gradient of each value ``[M, *B]`` at its own draw, of the shape of x; the graph of fx is retained.

    Raises:
        ScorefnError: x does not require grad, or fx does not depend on it; names the owner.
        NonFiniteError: it is NaN or infinite.
    """
    name = type(owner).__name__
    slope = None
    if fx.requires_grad and x.requires_grad:
        (slope,) = torch.autograd.grad(fx.sum(), x, retain_graph=True, create_graph=create_graph, allow_unused=True)
    if slope is None:
        cause = (
            "x does not require grad: pass what sample(p) returned, not a copy of it"
            if not x.requires_grad
            else ("f is constant in x, or compares, rounds, indexes or detaches it, or computes outside torch")
        )
        raise ScorefnError(
            f"{name} differentiates f with respect to the draws, but fx, of shape {tuple(fx.shape)}, does not depend "
            f"on x differentiably: {cause}. Compute f in differentiable torch operations on x as real numbers, or use "
            "scorefn.DisARM() or scorefn.ARMS(n), for which f is a black box."
        )
    if not (finite := torch.isfinite(slope)).all():
        first = tuple((~finite).nonzero()[0].tolist())
        raise NonFiniteError(
            f"The gradient of f is {slope[first].item()} at draw {first[0]} of {len(x)}, which would make the whole "
            f"gradient NaN. Nothing was updated. Give f a finite slope at the values of x, or use scorefn.DisARM()."
        )
    return slope
