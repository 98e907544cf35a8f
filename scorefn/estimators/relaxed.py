"""REBAR and RELAX: a control variate that sees the continuous noise behind a discrete draw.

A discrete draw is made from a continuous one, ``b = H(z)``: for ``Bernoulli`` ``z = logit p + logit u`` and
``b = 1[z > 0]``, for a categorical ``z = log p + Gumbel`` and ``b = onehot argmax z``. With ``z'`` drawn anew from
``z | b``, by a path that is differentiable in the parameters, and any function c::

    (f(b) - c(z')) grad log p(b) + grad c(z) - grad c(z') + grad f(b)

has the expectation grad E f. Given b, in the logits l = logit p and l = log p, with v uniform and E = -log v::

    Bernoulli      z' = log p - log(1 - p) + log v' - log(1 - v'),   v' = 1 - p (1 - v) if b = 1, (1 - p) v if b = 0
                      = s softplus(s logit v + softplus(s l)),   s = 2 b - 1, which loses no digits
    categorical    z'_b = -log E_b, and z'_c = -log(E_c / p_c + E_b) elsewhere: truncated Gumbels

whence ``dz'/dl = (1 - exp(-|z'|)) p(b)`` and, in each log-probability, ``1 - exp(z'_c - z'_b)``: the conditional draws
move with the parameters too. Nothing but the gradient in the logits is needed of c, so neither f's parameters nor c's
receive a gradient from the estimate.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Bernoulli, Categorical, Distribution, OneHotCategorical
from torch.nn.functional import logsigmoid, one_hot

from scorefn.core import ScorefnError, ShapeError
from scorefn.estimators.double_control_variate import input_gradient
from scorefn.estimators.estimator import Estimator, check_shape
from scorefn.estimators.finite import FAMILIES, unwrapped
from scorefn.estimators.gradient import beside, with_gradient
from scorefn.estimators.noise import uniform

_LEAST = -100.0  # a log-probability that no draw will see: impossible values need a finite z in a network


class _Relaxed(Estimator):
    """One hard draw, and a control whose parameters are tuned by the gradient of the variance."""

    unbiased = True
    evaluations: int
    _families: tuple[type, ...]
    _words: str

    @abstractmethod
    def parameters(self) -> list[nn.Parameter]:
        """What the gradient of the variance tunes: give them to an optimiser."""

    def surrogate(self, p: Distribution, x: Tensor, fx: Tensor) -> Tensor:
        """The value of f at the hard draw, ``[*B]``, with the gradient of the module's first formula.

        The gradient reaches the parameters of p and, from the hard draw, those of f; never those of the control.
        """
        unit = self._unit(p)
        check_shape(fx, (self.evaluations, *p.batch_shape))
        if not torch.is_grad_enabled():
            return fx[0]
        gradient = self._gradient(unit, x, fx, create_graph=False)
        return with_gradient(fx[0], unit.logits, gradient)

    def variance_loss(self, p: Distribution, x: Tensor, fx: Tensor) -> Tensor:
        """The squared length of the gradient in the logits, a scalar to be minimised over ``parameters()``.

        As the estimate is unbiased whatever the control, its expectation differs from the variance by a constant. Its
        gradient reaches ``parameters()`` and nothing else: neither the parameters of p nor those of f. Call it before
        the surrogate is differentiated, which frees the graph of fx. Source: Tucker et al. (2017), section 3.2.

        Raises:
            ScorefnError, ShapeError: as ``surrogate``.
        """
        unit = self._unit(p)
        check_shape(fx, (self.evaluations, *p.batch_shape))
        with torch.enable_grad():
            gradient = self._gradient(unit, x, fx, create_graph=True)
            squared = gradient.square().sum()
            loss = squared.detach()
            tuned = [parameter for parameter in self.parameters() if parameter.requires_grad]
            if tuned and squared.requires_grad:
                slopes = torch.autograd.grad(squared, tuned, retain_graph=True, allow_unused=True)
                for parameter, slope in zip(tuned, slopes, strict=True):
                    if slope is not None:
                        loss = with_gradient(loss, parameter, slope)
        return loss

    def weights(self, p: Distribution, x: Tensor) -> Tensor:
        """``[M]``: the value is f at the hard draw."""
        weights = super().weights(p, x)
        return torch.eye(len(x), dtype=weights.dtype, device=weights.device)[0]

    def _unit(self, p: Distribution) -> Any:
        return unwrapped(p, type(self).__name__, self._families, self._words)

    @abstractmethod
    def _gradient(self, unit: Any, x: Tensor, fx: Tensor, create_graph: bool) -> Tensor:
        """The gradient in the logits, ``[*batch, *sites]``, or ``[*batch, *sites, C]`` in the log-probabilities."""


class REBAR(_Relaxed):
    """f at relaxed points is the control: ``c(z) = scale f(relax(z / temperature))``.

    ``relax`` is the sigmoid for ``Bernoulli`` and the softmax for ``OneHotCategorical``. The draws ``[3, ...]`` are the
    hard one, the relaxed z and the relaxed z' of this module's formula, so f must be differentiable in a continuous
    extension, in torch operations on x as real numbers. Temperature and scale are parameters. The surrogate reads them
    as they were when x was drawn, so they are stepped last::

        x = estimator.sample(p)
        fx = f(x)
        loss = estimator.surrogate(p, x, fx).sum() + estimator.variance_loss(
            p, x, fx
        )  # of separate gradients
        loss.backward()
        optimiser.step()  # of p's and f's parameters
        tuner.step()  # of estimator.parameters()

    Source: Tucker, Mnih, Maddison, Lawson & Sohl-Dickstein (2017), "REBAR: low-variance, unbiased gradient estimates
    for discrete latent variable models".

    Args:
        temperature: above 0; the lower, the closer the relaxed points are to the hard ones.
        scale: the weight of the control.

    Raises:
        ScorefnError: temperature or scale is no such number, the distribution is of another family, or fx does not
            depend on x differentiably.
        ShapeError: fx is not ``[3, *B]``.
        NonFiniteError: the gradient of f is NaN or infinite.

    Example:
        >>> import torch
        >>> from scorefn import REBAR
        >>> logits = torch.zeros(3, requires_grad=True)
        >>> p = torch.distributions.Bernoulli(logits=logits)
        >>> estimator = REBAR(temperature=0.5)
        >>> estimator(p, lambda x: (x - 0.45).square().sum(-1)).backward()
    """

    evaluations = 3
    _families = (Bernoulli, OneHotCategorical)
    _words = "Bernoulli, OneHotCategorical, and Independent of these, whose values can be relaxed"

    def __init__(self, temperature: float = 0.5, scale: float = 1.0):
        for name, number in (("temperature", temperature), ("scale", scale)):
            if isinstance(number, bool) or not isinstance(number, Real) or not math.isfinite(number):
                raise ScorefnError(f"{name} must be a finite number, but it is {number!r}.")
        if temperature <= 0:
            raise ScorefnError(f"temperature must be above 0, but it is {temperature!r}: 0.5 is a good start.")
        self.log_temperature = nn.Parameter(torch.tensor(math.log(temperature), dtype=torch.float64))
        self.scale = nn.Parameter(torch.tensor(float(scale), dtype=torch.float64))

    def __repr__(self) -> str:
        return f"REBAR(temperature={self.log_temperature.exp().item():.4g}, scale={self.scale.item():.4g})"

    def parameters(self) -> list[nn.Parameter]:
        """The logarithm of the temperature and the scale."""
        return [self.log_temperature, self.scale]

    def sample(self, p: Distribution) -> Tensor:
        """The hard draw, relaxed z and relaxed z', ``[3, *batch, *event]``; they require grad."""
        unit = self._unit(p)
        with torch.no_grad():
            z, hard = _latent(unit)
            again = _conditional(unit, _own(unit, unit.logits), hard, _open_uniform(z))
        scaled = torch.stack((z, again)) / self.log_temperature.exp()
        relaxed = scaled.sigmoid() if isinstance(unit, Bernoulli) else scaled.softmax(-1)
        x = torch.cat((hard.unsqueeze(0), relaxed))
        return x if x.requires_grad or not torch.is_grad_enabled() else x.requires_grad_()

    def _gradient(self, unit: Any, x: Tensor, fx: Tensor, create_graph: bool) -> Tensor:
        slope = input_gradient(self, fx[1:], x, create_graph)[1:]  # its first row is 0: the hard draw is not in it
        relaxed, scale = x[1:], self.scale.view(())
        temperature = self.log_temperature.exp()
        if not create_graph:
            relaxed, scale, temperature = relaxed.detach(), scale.detach(), temperature.detach()
            fx = fx.detach()
        hard = x[0].detach()
        if isinstance(unit, Bernoulli):
            pulled = slope * relaxed * (1 - relaxed)
        else:
            pulled = relaxed * (slope - (slope * relaxed).sum(-1, keepdim=True))
        with torch.no_grad():  # how z' moves with the parameters is fixed by the noise, whatever the temperature
            mean, again = unit.probs, x[2]
            if isinstance(unit, Bernoulli):
                distance = torch.logit(torch.where(hard > 0, again, 1 - again)).clamp(min=0)
                moves = -torch.expm1(-temperature * distance) * torch.where(hard > 0, mean, (-unit.logits).sigmoid())
            else:
                logs = again.log()
                moves = -torch.expm1(temperature * (logs - logs.amax(-1, keepdim=True)))
        conditional = pulled[1] * moves
        if not isinstance(unit, Bernoulli):  # the log-probabilities are normalised
            conditional = conditional - mean * conditional.sum(-1, keepdim=True)
        score = beside(fx[0].detach() - scale * fx[2], hard) * (hard - mean)
        gradient: Tensor = score + scale / temperature * (pulled[0] - conditional)
        return gradient


class RELAX(_Relaxed):
    """A network of the latent noise is the control, so that f may be a black box: ``c(z) = control(z)``.

    f is called once, on one hard draw ``[1, ...]``; z and z' of this module's formula are both drawn given it. The
    control is tuned as in ``REBAR``: ``variance_loss(p, x, fx)`` is added to the loss, and the control's optimiser is
    stepped after the surrogate was read, so that the control does not know the draw that it serves.

    ``variance_loss`` draws z and z' anew. A control that contains a differentiable f, such as
    ``f(sigmoid(z / temperature)) + network(z)``, is the paper's second form. Serves ``Bernoulli``, ``Categorical``,
    ``OneHotCategorical`` and ``Independent`` of these. Source: Grathwohl, Choi, Wu, Roeder & Duvenaud (2018),
    "Backpropagation through the void: optimizing control variates for black-box gradient estimation".

    Args:
        control: a module, z ``[2, *batch, *sites]`` (with a last axis of C for a categorical) to ``[2, *B]``,
            differentiable twice, entry by entry along the first axis.

    Raises:
        ScorefnError: control is no module or does not depend on z differentiably, or the distribution is of another
            family.
        ShapeError: fx is not ``[1, *B]``, or the control returned another shape than ``[2, *B]``.

    Example:
        >>> import torch
        >>> from scorefn import RELAX
        >>> class Network(torch.nn.Linear):
        ...     def forward(self, z):
        ...         return super().forward(z.tanh()).squeeze(-1)
        >>> logits = torch.zeros(3, requires_grad=True)
        >>> p = torch.distributions.Bernoulli(logits=logits)
        >>> RELAX(Network(3, 1))(p, lambda x: (x > 0.5).all(-1)).backward()
    """

    evaluations = 1
    _families = (Bernoulli, Categorical, OneHotCategorical)
    _words = FAMILIES

    def __init__(self, control: nn.Module):
        if not isinstance(control, nn.Module):
            raise ScorefnError(
                f"control={control!r} is no torch.nn.Module, whose parameters can be tuned: give one that maps z "
                "[2, *batch, *event] to [2, *B]."
            )
        self.control = control

    def __repr__(self) -> str:
        return f"RELAX({type(self.control).__name__})"

    def parameters(self) -> list[nn.Parameter]:
        """The control's."""
        return list(self.control.parameters())

    def sample(self, p: Distribution) -> Tensor:
        """One hard draw, ``[1, *batch, *event]``."""
        x: Tensor = self._unit(p).sample(torch.Size((1,)))
        return x

    def _gradient(self, unit: Any, x: Tensor, fx: Tensor, create_graph: bool) -> Tensor:
        logits = unit.logits.detach()
        hard = x[0].detach()
        if not hard.is_floating_point():
            hard = one_hot(hard, logits.shape[-1]).to(logits.dtype)
        theta = logits.clone().requires_grad_()
        own = _own(unit, theta)
        with torch.no_grad():
            noise = _conditional(unit, own, hard, _open_uniform(own)) - own
        again = _conditional(unit, own, hard, _open_uniform(own))
        control = self.control(torch.stack((own + noise, again)))
        if not isinstance(control, Tensor) or control.shape != (2, *fx.shape[1:]):
            found = tuple(control.shape) if isinstance(control, Tensor) else type(control).__name__
            raise ShapeError(
                f"The control returned {found} for z of shape {(2, *logits.shape)}, but f returned {tuple(fx.shape)}: "
                f"the control must return [2, *B] = {(2, *fx.shape[1:])}, one value for z and one for z'."
            )
        slope = None
        if control.requires_grad:
            (slope,) = torch.autograd.grad(
                (control[0] - control[1]).sum(), theta, create_graph=create_graph, allow_unused=True
            )
        if slope is None:
            raise ScorefnError(
                f"{type(self.control).__name__} does not depend on z differentiably, and without the gradient of the "
                "control the estimate would be biased. Compute it in differentiable torch operations on z; a constant "
                "is a baseline, for which scorefn.expectation has baseline=."
            )
        control = control[1] if create_graph else control[1].detach()
        gradient: Tensor = beside(fx[0].detach() - control, hard) * (hard - unit.probs.detach()) + slope
        return gradient


def _open_uniform(like: Tensor) -> Tensor:
    """Uniforms that have a logarithm, one for each entry."""
    return uniform(tuple(like.shape), like).clamp(min=torch.finfo(like.dtype).eps / 4)


def _own(unit: Any, logits: Tensor) -> Tensor:
    """The logits of a coin, or normalised log-probabilities without infinities."""
    return logits if isinstance(unit, Bernoulli) else logits.log_softmax(-1).clamp(min=_LEAST)


def _latent(unit: Any) -> tuple[Tensor, Tensor]:
    """z and the hard draw that it decides, ``[*batch, *sites]`` or ``[*batch, *sites, C]``."""
    logits = _own(unit, unit.logits)
    u = _open_uniform(logits)
    if isinstance(unit, Bernoulli):
        z = logits + torch.logit(u)
        return z, (z > 0).to(z.dtype)
    z = logits - (-u.log()).log()
    return z, one_hot(z.argmax(-1), z.shape[-1]).to(z.dtype)


def _conditional(unit: Any, logits: Tensor, hard: Tensor, v: Tensor) -> Tensor:
    """z given the hard draw that it decided, from uniforms; differentiable in the logits, as ``_own`` gives them."""
    if isinstance(unit, Bernoulli):
        sign = 2 * hard - 1
        return sign * _softplus(sign * torch.logit(v) + _softplus(sign * logits))
    exponential = -v.log()
    top = (hard * exponential).sum(-1, keepdim=True).log()
    rest = torch.logaddexp(exponential.log() - logits, top)
    return torch.where(hard > 0, -top, -rest)


def _softplus(x: Tensor) -> Tensor:
    """``log(1 + exp(x))``; torch's own drops what is below 2e-9."""
    return -logsigmoid(-x)
