"""Draws: what was sampled, how likely it was, what it was worth; and ``draw``, which makes them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from scorefn.core.checks import (
    as_values,
    check_count,
    check_detached,
    check_fields,
    check_values,
    importance_weight,
    kind_of,
    no_part,
    value_shape_message,
)
from scorefn.core.defaults import Total
from scorefn.core.errors import ScorefnError, ShapeError
from scorefn.core.protocols import (
    Coupling,
    Credit,
    Integrand,
    Measure,
    PyTree,
    StructuredMeasure,
    in_transform,
    tensor_leaves,
)
from scorefn.core.representation import brief
from scorefn.core.support import check_support


@dataclass(frozen=True, eq=False)
class Draws:
    """N draws of a measure, their log-probabilities and their values.

    Args:
        x: what was sampled, a pytree with leading N, detached.
        log_prob: ``[N, *B, K]``, of each decision in topological order; requires grad when grad mode is on.
        fx: ``[N, *B, J]``, each value; may itself require grad (the pathwise part).
        credit: how values are charged to decisions.
        behaviour_log_prob: ``[N, *B, K]`` under the distribution that was sampled; None: on-policy.
        mask: ``[N, *B, K]`` bool, False where a decision is absent; applied by ``where``, never by multiplication.
        block: ``[N]`` int, draws that share randomness; None: each its own.
        group: ``[N]`` int, draws of the same expectation (a prompt, a start state); None: all.
        context: pytree with leading N, what the decisions were made from (observations): the features that a value
            function reads when it is given none.
        fitted: whether the values were corrected by something that was fitted to these same draws: nothing else that
            is fitted to them, but leave-one-out, keeps the expectation then.

    Raises:
        ShapeError: fields that do not fit each other, or no draws at all.
        NonFiniteError: a NaN or infinite fx or log_prob, with the draws named.
        ScorefnError: dtypes or devices are mixed, x requires grad, or log_prob cannot give a gradient.

    Example:
        >>> import torch, scorefn as sf
        >>> logit = torch.tensor(0.0, requires_grad=True)
        >>> coin = torch.distributions.Bernoulli(logits=logit)
        >>> x = torch.tensor([0.0, 1.0, 1.0])  # sampled elsewhere; paid 1, 4 and 1
        >>> draws = sf.Draws(x, coin.log_prob(x)[:, None], torch.tensor([[1.0], [4.0], [1.0]]))
        >>> sf.surrogate(draws, baseline=sf.LeaveOneOut()).mean().backward()
        >>> logit.grad  # mean of (-1.5, 3, -1.5), above the others, times scores (-1, 1, 1)/2
        tensor(0.5000)
    """

    x: PyTree
    log_prob: Tensor
    fx: Tensor
    credit: Credit = Total()  # noqa: RUF009
    behaviour_log_prob: Tensor | None = None
    mask: Tensor | None = None
    block: Tensor | None = None
    group: Tensor | None = None
    context: PyTree = None
    fitted: bool = False

    def __post_init__(self) -> None:
        """Check every field against log_prob; absent decisions get log-probability 0."""
        if not self.fx.dtype.is_floating_point and not self.fx.dtype.is_complex:
            object.__setattr__(self, "fx", self.fx.to(self.log_prob.dtype))
        check_fields(self)
        check_detached(self.x, len(self))
        if self.mask is not None:
            for name in ("log_prob", "behaviour_log_prob"):
                if (tensor := getattr(self, name)) is not None:
                    object.__setattr__(self, name, torch.where(self.mask, tensor, 0.0))
        if not in_transform():
            check_values(self)

    def __len__(self) -> int:
        """N."""
        return int(self.log_prob.shape[0])

    def __repr__(self) -> str:
        """The axes, what was sampled, and whatever is not plain; no values."""
        n, *batch, k = self.log_prob.shape
        told = [f"N={n}, B={tuple(batch)}, K={k}, J={self.fx.shape[-1]}", f"x={brief(self.x)}"]
        told += [] if isinstance(self.credit, Total) else [f"credit={self.credit!r}"]
        told += ["on-policy" if self.behaviour_log_prob is None else "off-policy"]
        told += [name for name in ("mask", "block", "group", "context") if getattr(self, name) is not None]
        if self.block is not None and not in_transform():
            told[told.index("block")] = f"{self.num_blocks} blocks"
        return f"Draws({', '.join(told + ['fitted'] * self.fitted)})"

    def __getitem__(self, index: slice | Tensor) -> Draws:
        """Some of the draws: a slice, a bool mask ``[N]`` or integer positions."""
        if not isinstance(index, slice) and getattr(index, "ndim", 0) == 0:
            raise ShapeError(
                f"draws[{index}] would drop the axis of draws: use a slice, such as draws[1:2] for one draw."
            )

        def take(leaf: Any) -> Any:
            return None if leaf is None else leaf[index]

        tensors = ("log_prob", "fx", "behaviour_log_prob", "mask", "block", "group")
        return replace(
            self,
            x=pytree.tree_map(take, self.x),
            credit=self.credit[index],
            context=pytree.tree_map(take, self.context),
            **{name: take(getattr(self, name)) for name in tensors},
        )

    @property
    def num_blocks(self) -> int:
        """How many blocks of draws are independent of each other."""
        return len(self) if self.block is None else self._num_labels

    @cached_property
    def _num_labels(self) -> int:
        return int(torch.unique(self.block).numel())

    def bound(self, credit: Credit | None) -> Draws:
        """These draws with the credit to use: their own, or the given one completed by it.

        Raises:
            ShapeError: a credit other than ``Total`` for draws of a single decision and a single value.
        """
        if credit is None and type(self.credit) is Total:
            return self
        if credit is not None and not isinstance(credit, Credit):
            raise no_part("credit", credit, "use Total(), RewardToGo() or Influence(mask), or None for the draws' own.")
        decisions, values = self.log_prob.shape[-1], self.fx.shape[-1]
        if credit is not None and decisions == values == 1 and type(self.credit) is Total is not type(credit):
            raise ShapeError(
                f"credit={credit!r} was given for a measure with one decision and one value per draw: the batch "
                f"dimensions {tuple(self.log_prob.shape[1:-1])} are independent problems, not decisions in sequence. "
                "Leave credit out, or sample from a structured measure (a trajectory, a guide)."
            )
        chosen = self.credit if credit is None else credit.bind(self.credit)
        chosen.check(decisions, values)
        if chosen is self.credit:
            return self
        bound = copy.copy(self)  # nothing else changes, so nothing needs to be checked again
        object.__setattr__(bound, "credit", chosen)
        bound.__dict__.pop("uninfluenced", None)
        return bound

    def weighted(self) -> Tensor:
        """Each value times its importance weight ``[N, *B, J]``: fx itself on-policy.

        Off-policy ``w_j = exp(sum of log_prob - behaviour_log_prob over the decisions that influence j)``.

        Raises:
            NonFiniteError: a weight overflows.
        """
        if self.behaviour_log_prob is None:
            return self.fx
        log_ratio = self.log_prob.detach() - self.behaviour_log_prob
        return importance_weight(self.credit.influence_adjoint(log_ratio)) * self.fx

    @cached_property
    def uninfluenced(self) -> Tensor:
        """Sum of the weighted values that do not depend on each decision, ``[N, *B, K]``, detached."""
        values = self.fx.detach()
        if (value_weight := self.credit.value_weight(values)) is not None:
            values = value_weight * values
        return self.credit.uninfluenced(values)

    def signal(self, credit: Credit | None = None) -> Tensor:
        """What is charged to each decision and what a baseline is compared with, ``[N, *B, K]``, detached."""
        bound = self.bound(credit)
        return bound.credit(bound.weighted().detach())


def draw(p: Measure | StructuredMeasure, f: Integrand, num_samples: int, *, coupling: Coupling | None = None) -> Draws:
    """Sample ``num_samples`` draws of p and call f on them exactly once.

    For a plain measure, f maps x ``[N, *batch, *event]`` to ``[N, *B]``, where B is a leading part of the batch
    shape; the log-probabilities of the remaining batch dimensions are summed (one joint decision). Shapes are never
    repaired. A structured measure makes its own draws. Source: Williams (1992).

    Args:
        p: any ``torch.distributions`` object, any object with ``sample`` and ``log_prob``, or a structured measure.
        f: the integrand; a tensor, array or list of numbers is returned. It must not change x in place.
        num_samples: N, at least 1.
        coupling: how the draws share randomness; None: independent.

    Raises:
        ShapeError: f's shape is not ``[N, *B]``.
        SupportError: the support of p moves with a parameter that requires grad.
        NonFiniteError: f or log_prob is NaN or infinite, with the draws named.
        ScorefnError: p is not a measure, or x requires grad, or f changed x in place. An error inside f is raised
            as it is, with the shape of the draws as a note.

    Example:
        >>> import torch, scorefn as sf
        >>> p = torch.distributions.Normal(torch.zeros(4, requires_grad=True), 1.0)
        >>> sf.draw(p, lambda x: x.square(), 10).log_prob.shape  # four problems
        torch.Size([10, 4, 1])
        >>> sf.draw(p, lambda x: x.sum(-1), 10).log_prob.shape  # one, of a joint decision
        torch.Size([10, 1])
    """
    return drawn(p, f, num_samples, coupling)


def drawn(
    p: Measure | StructuredMeasure,
    f: Integrand,
    num_samples: int,
    coupling: Coupling | None,
    shape: Callable[[Tensor], Tensor] | None = None,
) -> Draws:
    """As ``draw``; the values of a plain measure are shaped before they are checked."""
    if type(num_samples) is not int or num_samples < 1:
        num_samples = check_count("num_samples", num_samples)
    if callable(structured := getattr(p, "draws", None)):
        draws: Draws = structured(f, num_samples, coupling=coupling)
        return draws
    if not (hasattr(p, "sample") and hasattr(p, "log_prob")):
        raise ScorefnError(
            f"{type(p).__name__} is not a measure: it needs sample(sample_shape) and log_prob(x), as every "
            "torch.distributions object has them, or draws(f, num_samples, coupling=...) for several decisions."
        )
    p = cast(Measure, p)
    if coupling is not None and (isinstance(coupling, type) or not callable(getattr(coupling, "sample", None))):
        raise no_part("coupling", coupling, "use Antithetic(), Sobol() or another one, or None for independent draws.")
    check_support(p)
    x, block = (p.sample(torch.Size((num_samples,))), None) if coupling is None else coupling.sample(p, num_samples)
    check_detached(x, num_samples)
    fx = _called(f, copied(x))  # before the log-probabilities, which are large until they are summed
    x = x.detach() if isinstance(x, Tensor) else pytree.tree_map(_anew, x)  # no transform's cache knows this object
    log_prob = p.log_prob(x)
    if not isinstance(log_prob, Tensor) or log_prob.shape[:1] != (num_samples,):
        raise ShapeError(
            f"{type(p).__name__}.log_prob returned {kind_of(log_prob)} for draws of leading shape "
            f"{(num_samples,)}: it must return [N, *batch], summing over event dimensions only."
        )
    fx = as_values(fx, log_prob, keep_integers=shape is not None)
    log_prob, fx = joint_log_prob(log_prob, fx), fx.unsqueeze(-1)
    return Draws(x, log_prob, fx if shape is None else as_shaped(shape, fx, log_prob), block=block)


def as_shaped(shape: Callable[[Tensor], Tensor], fx: Tensor, log_prob: Tensor) -> Tensor:
    """The shaped values; integers are given as numbers like log_prob, unless these would round them."""
    if fx.is_floating_point() or fx.is_complex():
        return shape(fx)
    exact = fx.to(log_prob.dtype)
    return shape(exact) if in_transform() or torch.equal(exact.to(fx.dtype), fx) else shape(fx).to(log_prob.dtype)


def joint_log_prob(log_prob: Tensor, fx: Tensor) -> Tensor:
    """Sum log_prob ``[N, *batch]`` over the batch dimensions that fx ``[N, *B]`` does not keep: ``[N, *B, 1]``.

    Raises:
        ShapeError: fx is not ``[N, *B]`` with B a leading part of the batch shape.

    Example:
        >>> import torch, scorefn as sf
        >>> log_prob = torch.tensor([[-1.0, -2.0], [-3.0, -4.0]])  # two draws of a batch of two
        >>> sf.core.joint_log_prob(log_prob, torch.zeros(2)).T  # f gave one value per draw
        tensor([[-3., -7.]])
        >>> sf.core.joint_log_prob(log_prob, torch.zeros(2, 2)).shape  # f gave one per entry
        torch.Size([2, 2, 1])
    """
    if fx.ndim == 0 or fx.shape != log_prob.shape[: fx.ndim]:
        raise ShapeError(value_shape_message(tuple(fx.shape), tuple(log_prob.shape)))
    if log_prob.ndim == fx.ndim:
        return log_prob.unsqueeze(-1)
    return (log_prob if log_prob.ndim == fx.ndim + 1 else log_prob.flatten(fx.ndim)).sum(-1, keepdim=True)


def evaluate(f: Integrand, x: PyTree, log_prob: Tensor) -> Tensor:
    """Call f once, on a copy of the draws; refuse one that changes it; make a tensor of what it returns.

    Args:
        f: the integrand.
        x: pytree with leading N.
        log_prob: gives dtype and device to values that are not tensors.

    Raises:
        ScorefnError: f changed x in place, or did not return real numbers. An error inside f is raised as it is, with
            the shape of the draws as a note.

    Example:
        >>> import torch, scorefn as sf
        >>> x, log_prob = torch.tensor([1.0, 2.0, 3.0]), torch.zeros(3, dtype=torch.float64)
        >>> sf.core.evaluate(lambda x: [value.item() ** 2 for value in x], x, log_prob)
        tensor([1., 4., 9.], dtype=torch.float64)
        >>> sf.core.evaluate(lambda x: x.mul_(2), x, log_prob)
        Traceback (most recent call last):
        scorefn.core.errors.ScorefnError: f changed the draws x in place: it may read them only. Work on x.clone().
    """
    return as_values(_called(f, copied(x)), log_prob)


def _called(f: Integrand, x: PyTree) -> Any:
    version = _version(x)
    try:
        fx = f(x)
    except Exception as error:
        error.add_note(f"scorefn called f with draws x of shape {[tuple(a.shape) for a in tensor_leaves(x)]}, N first.")
        raise
    if version != _version(x):
        raise ScorefnError("f changed the draws x in place: it may read them only. Work on x.clone().")
    return fx


def _version(x: PyTree) -> int:
    """How often the draws were changed in place, where that can be read."""
    if in_transform():
        return 0
    return sum(0 if leaf.is_inference() else leaf._version for leaf in tensor_leaves(x))


def _anew(leaf: Any) -> Any:
    return leaf.detach() if isinstance(leaf, Tensor) else leaf


def copied(x: PyTree) -> PyTree:
    """The draws in memory of their own."""
    if isinstance(x, Tensor):
        return x.clone()
    return pytree.tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, x)
