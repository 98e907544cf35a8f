"""Several independent choices at once: the distribution of MultiDiscrete actions."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.distributions import Distribution, constraints, register_kl

from scorefn.core import ScorefnError, ShapeError, check_count


class MultiCategorical(Distribution):
    """D independent categorical choices among ``counts[0], ..., counts[D - 1]`` values: ``p(x) = prod_d p_d(x_d)``.

    Batch shape ``[*batch]``, event shape ``[D]``; values are int64, choice d from 0 to ``counts[d] - 1``.

    Args:
        counts: D integers of at least 1, the sizes of the choices; ``space.nvec`` of a MultiDiscrete space.
        logits: ``[*batch, sum(counts)]``, those of the first choice, then those of the second, and so on; one that is
            -inf rules its value out.

    Raises:
        ScorefnError: counts are no integers of at least 1, or none at all.
        ShapeError: logits do not end with ``sum(counts)``.

    Example:
        >>> import torch
        >>> from scorefn.trajectories import MultiCategorical
        >>> p = MultiCategorical([2, 3], torch.zeros(5, 2 + 3))
        >>> p.batch_shape, p.event_shape
        (torch.Size([5]), torch.Size([2]))
        >>> p.log_prob(torch.tensor([1, 2])).exp()[0]  # 1/2 times 1/3
        tensor(0.1667)
    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {"logits": constraints.real_vector}
    has_enumerate_support = True

    def __init__(self, counts: Iterable[int], logits: Tensor, validate_args: bool | None = None) -> None:
        self.counts = check_counts(counts)
        check_logits(logits, self.counts)
        self.logits = torch.cat([part.log_softmax(-1) for part in logits.split(self.counts, -1)], -1)
        super().__init__(logits.shape[:-1], torch.Size([len(self.counts)]), validate_args)

    @property
    def parts(self) -> tuple[Tensor, ...]:
        """Log-probabilities of each choice, D times ``[*batch, counts[d]]``."""
        parts: tuple[Tensor, ...] = self.logits.split(self.counts, -1)
        return parts

    @constraints.dependent_property(is_discrete=True, event_dim=1)
    def support(self) -> Any:
        """Integers from 0 to ``counts - 1``."""
        last = torch.tensor(self.counts, device=self.logits.device) - 1
        return constraints.independent(constraints.integer_interval(0, last), 1)

    @property
    def mode(self) -> Tensor:
        """The likeliest value, ``[*batch, D]``; the first of several."""
        return torch.stack([part.argmax(-1) for part in self.parts], -1)

    @torch.no_grad()
    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Draws ``[*sample_shape, *batch, D]``."""
        shape = (*sample_shape, *self.batch_shape, self.logits.shape[-1])
        return raced(self.logits.expand(shape), self.counts)

    def log_prob(self, value: Tensor) -> Tensor:
        """``sum_d log p_d(value_d)``, ``[*sample_shape, *batch]``.

        Raises:
            ShapeError: value is not ``[..., D]``.
        """
        if value.shape[-1:] != self.event_shape:
            raise ShapeError(
                f"The value has shape {tuple(value.shape)}, but each value of choices among {list(self.counts)} ends "
                f"with {len(self.counts)} numbers, one for each choice."
            )
        if self._validate_args:
            self._validate_sample(value)
        shape = torch.broadcast_shapes(value.shape[:-1], self.batch_shape)
        chosen = value.long().expand(*shape, -1).unsqueeze(-1).unbind(-2)
        terms = [part.expand(*shape, -1).gather(-1, d) for part, d in zip(self.parts, chosen, strict=True)]
        return torch.cat(terms, -1).sum(-1)

    def entropy(self) -> Tensor:
        """The entropies' sum, ``[*batch]``."""
        # what is ruled out adds 0 log 0 = 0
        return -(self.logits.exp() * self.logits.clamp_min(torch.finfo(self.logits.dtype).min)).sum(-1)

    def enumerate_support(self, expand: bool = True) -> Tensor:
        """Every value, ``[prod(counts), *batch, D]``, or with ones in the place of batch."""
        values = torch.cartesian_prod(*[torch.arange(n, device=self.logits.device) for n in self.counts])
        values = values.reshape(-1, *[1] * len(self.batch_shape), len(self.counts))
        return values.expand(-1, *self.batch_shape, -1) if expand else values

    def expand(self, batch_shape: Any, _instance: Any = None) -> MultiCategorical:
        """The same distribution with a larger batch shape."""
        instance: Any = self._get_checked_instance
        new: MultiCategorical = instance(MultiCategorical, _instance)
        new.counts = self.counts
        new.logits = self.logits.expand(*batch_shape, -1)
        super(MultiCategorical, new).__init__(torch.Size(batch_shape), self.event_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new


def _kl(p: MultiCategorical, q: MultiCategorical) -> Tensor:
    if p.counts != q.counts:
        raise ShapeError(
            f"Choices among {list(p.counts)} and among {list(q.counts)} values have no values in common: the "
            "Kullback-Leibler divergence needs the same counts."
        )
    difference = torch.where(p.logits == -torch.inf, 0, p.logits - q.logits)  # 0 log 0 = 0
    return (p.logits.exp() * difference).sum(-1)


register_kl(MultiCategorical, MultiCategorical)(_kl)


def check_counts(counts: Iterable[int]) -> tuple[int, ...]:
    """The sizes of the choices as ints, refused where they are none."""
    checked = tuple(check_count("each of the counts", count) for count in counts)
    if not checked:
        raise ScorefnError("counts is empty, but there must be at least one choice: give the number of values of each.")
    return checked


def check_logits(logits: Tensor, counts: tuple[int, ...]) -> None:
    """Refuse logits that do not end with ``sum(counts)``."""
    if logits.ndim == 0 or logits.shape[-1] != sum(counts):
        raise ShapeError(
            f"The logits have shape {tuple(logits.shape)}, but choices among {list(counts)} values need "
            f"[*batch, {sum(counts)}], one logit for each value of each choice."
        )


def raced(logits: Tensor, counts: tuple[int, ...]) -> Tensor:
    """A draw of each choice, ``[*batch, sum(counts)] -> [*batch, D]``: exponential clocks of rate ``exp(logits)``."""
    late = logits.sub(torch.empty_like(logits).exponential_().log_())
    return torch.stack([part.argmax(-1) for part in late.split(counts, -1)], -1)
