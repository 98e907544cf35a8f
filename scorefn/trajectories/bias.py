"""What is declared of an objective: whether its expected gradient is the true one, or a known multiple of it."""

from __future__ import annotations

from dataclasses import dataclass

from scorefn.core.representation import representation


@dataclass(frozen=True)
class Bias:
    """How the expected gradient of an objective relates to that of ``sum_i E f_i / denominator``.

    ::

        E grad objective = scale * grad sum_i E f_i / denominator

    Objectives made of several parts have the product of the scales, and no scale where one part has none.

    Args:
        scale: the one is ``scale`` times the other: 1 is unbiased, another number unbiased up to that known scale;
            None: no such number exists.
        because: why not, in words; empty where there is a scale.

    Example:
        >>> from scorefn.trajectories import Bias
        >>> str(Bias()), str(Bias(0.75))
        ('unbiased', 'unbiased up to the known scale 0.75')
        >>> print(Bias(0.75) * Bias(None, ("each sequence is divided by its own length",)))
        biased: each sequence is divided by its own length
    """

    scale: float | None = 1.0
    because: tuple[str, ...] = ()

    __repr__ = representation

    @property
    def unbiased(self) -> bool:
        """Whether the scale is 1."""
        return self.scale == 1.0

    def __str__(self) -> str:
        """In words."""
        if self.scale is None:
            return f"biased: {'; '.join(self.because)}"
        return "unbiased" if self.unbiased else f"unbiased up to the known scale {self.scale:.6g}"

    def __mul__(self, other: Bias) -> Bias:
        """The bias of both together."""
        scale = None if self.scale is None or other.scale is None else self.scale * other.scale
        return Bias(scale, self.because + other.because)
