"""The average of a fit's last iterates, and when there are enough of them."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
from torch import Tensor

from scorefn.core import NonFiniteError, ScorefnError, ShapeError, check_count
from scorefn.posteriors.batch_means import lugsail
from scorefn.posteriors.parameters import HasParameters, Source, assign, floating_tensors

Scale: TypeAlias = Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]

_WINDOWS = 5
_LEAST_HALVES = 8  # blocks of a window, for R-hat
_LEAST_BLOCKS = 16  # of a window, for a standard error: eight batches of two


class IterateAverage:
    """The average of the iterates of a stationary phase, with R-hat, standard error and a rule for stopping.

    With a fixed learning rate, stochastic gradients end in a stationary wandering round the optimum. Its average is
    far nearer to the optimum than any iterate, and its error can be read from the iterates. A phase goes on until

    1. some window of the last iterates is stationary: R-hat of its two halves is at most ``max_r_hat`` in every
       coordinate. Five windows are tried, from ``min_window`` to .95 of all iterates, and the one of the smallest
       R-hat is kept; it then grows, and is looked for anew should its R-hat rise above the limit again;
    2. the average over this window has a Monte Carlo standard error below ``max_mcse`` in every coordinate, in units
       of ``scale``, and an effective sample size of at least ``min_ess``.

    For halves of n iterates, means m_1 and m_2 and mean within-half variance W::

        R-hat^2 = (n - 1)/n + (m_1 - m_2)^2 / (2 W)

    The standard error is that of lugsail batch means: with V_b the variance of the mean that follows from the means of
    8 to 32 batches of length b, ``max(2 V_b - V_{b/2}, V_b)``, in which what autocorrelation hides from V_b cancels to
    first order. Sources: Dhaka et al. (2020), "Robust, accurate stochastic optimization for variational inference";
    Welandawe, Andersen, Vehtari & Huggins (2022), "Robust, automated, and accurate black-box variational inference",
    algorithm 1, for the rule; Vats & Flegal (2022), "Lugsail lag windows", for the error.

    Iterates are kept as sums over at most ``max_blocks`` blocks, which are merged in pairs when they are full, never
    one by one; a window is at least an eighth of them all. Constrained parameters are averaged where the optimiser
    moves them: without the constraint.

    Args:
        min_window: the shortest window, and how often the rule is looked at, in iterates.
        max_r_hat: limit of R-hat.
        max_mcse: limit of the standard error, relative to ``scale``.
        min_ess: least effective sample size; None: ``min_window / 8``.
        scale: from the average, by name, the units of some parameters, that broadcast to them; others count in units
            of 1, as logits and logarithms should. For a normal guide: ``lambda average: {"loc":
            average["log_scale"].exp()}``.
        max_blocks: a multiple of 4, at least 32.

    Raises:
        ScorefnError: a limit that no fit can meet, or that any would.

    Example:
        >>> import torch
        >>> from scorefn.posteriors import IterateAverage
        >>> _ = torch.manual_seed(0)
        >>> x, average = torch.tensor([5.0]), IterateAverage(max_mcse=0.05)
        >>> while not average.converged:
        ...     x = x - 0.1 * (x + torch.randn(1))  # the noisy gradient of x^2/2
        ...     average.update({"x": x})
        >>> abs(average.average()["x"].item()) < 4 * 0.05
        True
    """

    def __init__(
        self,
        *,
        min_window: int = 200,
        max_r_hat: float = 1.1,
        max_mcse: float = 0.1,
        min_ess: float | None = None,
        scale: Scale | None = None,
        max_blocks: int = 64,
    ) -> None:
        self.min_window = check_count("min_window", min_window)
        if min_window < _LEAST_BLOCKS:
            raise ScorefnError(f"min_window must be at least {_LEAST_BLOCKS}, but it is {min_window}.")
        if not 1 < max_r_hat < math.inf:
            raise ScorefnError(
                f"max_r_hat must be above 1, which is perfect, and finite, but it is {max_r_hat!r}. 1.1 is usual."
            )
        if not 0 < max_mcse < math.inf:
            raise ScorefnError(
                f"max_mcse must be above 0 and finite, but it is {max_mcse!r}: no fit could meet it, or any would. "
                "0.1 is usual."
            )
        if min_ess is not None and not 0 < min_ess < math.inf:
            raise ScorefnError(
                f"min_ess must be above 0 and finite, but it is {min_ess!r}: no fit could meet it, or any would. Leave "
                "it out for min_window / 8."
            )
        if check_count("max_blocks", max_blocks) < 32 or max_blocks % 4:
            raise ScorefnError(f"max_blocks must be a multiple of 4 and at least 32, but it is {max_blocks}.")
        self.max_r_hat = max_r_hat
        self.max_mcse = max_mcse
        self.min_ess = min_window / 8 if min_ess is None else min_ess
        self.scale = scale
        self.max_blocks = max_blocks
        self.reset()

    def reset(self) -> None:
        """Forget all iterates: a new phase, after the learning rate was lowered."""
        self._shapes: dict[str, torch.Size] = {}
        self._dtypes: dict[str, torch.dtype] = {}
        self._length = self.min_window // _LEAST_BLOCKS  # iterates in a block
        self._means: list[Tensor] = []  # of full blocks, [P] each
        self._squares: list[Tensor] = []  # sums of squared deviations from their means
        self._count = 0  # iterates in the block that is being filled
        self._mean = self._square = torch.zeros(0, dtype=torch.float64)
        self._updates = 0
        self._start: int | None = None  # the first block of a window that was found stationary
        self._converged = False

    def __repr__(self) -> str:
        """The limits that are not the usual ones, how many iterates there were, and whether they are enough."""
        usual = inspect.signature(IterateAverage).parameters
        given = {name: getattr(self, name) for name in usual if name not in ("min_ess", "scale")}
        shown = [f"{name}={value}" for name, value in given.items() if value != usual[name].default]
        if self.min_ess != self.min_window / 8:
            shown.append(f"min_ess={self.min_ess}")
        shown += ["scale=..."] if self.scale is not None else []
        return f"IterateAverage({', '.join([*shown, f'{self._updates} iterates, converged={self._converged}'])})"

    @property
    def num_updates(self) -> int:
        """How many iterates were seen in this phase."""
        return self._updates

    @property
    def window(self) -> int:
        """How many iterates the average is over."""
        return (len(self._means) - self._first()) * self._length if self._means else self._count

    @property
    def stationary(self) -> bool:
        """Whether a stationary window was found."""
        return self._start is not None

    @property
    def converged(self) -> bool:
        """Whether stationarity, standard error and effective sample size met their limits when last looked at."""
        return self._converged

    def update(self, source: Source) -> None:
        """Take in one iterate.

        Args:
            source: a module, ``pyro.get_param_store()``, or tensors by name; the same ones each time. Those that are
                not floating-point are left out.

        Raises:
            ShapeError: other names or shapes than before; nothing is taken in.
            NonFiniteError: a parameter that is NaN or infinite; nothing is taken in.
        """
        tensors = floating_tensors(source)
        shapes = {name: tensor.shape for name, tensor in tensors.items()}
        if self._updates:
            self._check(shapes)
        values = torch.cat([tensor.reshape(-1).double() for tensor in tensors.values()])
        if not bool(values.isfinite().all()):
            bad = [name for name, tensor in tensors.items() if not bool(tensor.isfinite().all())]
            raise NonFiniteError(
                f"Parameters {bad} are NaN or infinite after {self._updates} finite iterates, so the fit has diverged: "
                "their average means nothing. Go back to .average(), with a lower learning rate."
            )
        if not self._updates:
            self._shapes, self._dtypes = shapes, {name: tensor.dtype for name, tensor in tensors.items()}
        self._updates += 1
        self._count += 1
        if self._count == 1:
            self._mean, self._square = values, torch.zeros_like(values)
        else:
            before = values - self._mean
            self._mean = self._mean + before / self._count
            self._square = self._square + before * (values - self._mean)
        if self._count == self._length:
            self._means.append(self._mean)
            self._squares.append(self._square)
            self._count = 0
            if len(self._means) == self.max_blocks:
                self._merge()
        if self._updates % self.min_window == 0:
            self._look()

    def average(self) -> dict[str, Tensor]:
        """The average over the window, by name, in each parameter's shape: the later half until one is stationary.

        Raises:
            ScorefnError: there are no iterates yet.
        """
        if not self._updates:
            raise ScorefnError("There are no iterates to average: call update(...) after each step of the optimiser.")
        flat = torch.stack(self._means[self._first() :]).mean(0) if self._means else self._mean
        return {name: value.to(self._dtypes[name]) for name, value in self._unflattened(flat).items()}

    @property
    def r_hat(self) -> float:
        """The largest R-hat of the window over all coordinates; NaN before there is a window."""
        first = self._first()
        return float(self._r_hat(first).max()) if len(self._means) - first >= 2 else math.nan

    def mcse(self) -> dict[str, Tensor]:
        """Monte Carlo standard error of the average, by name, in the shapes and units of the parameters.

        Raises:
            ScorefnError: there are fewer than 16 blocks of iterates in the window.
        """
        return self._unflattened(self._error_squared().sqrt())

    def ess(self) -> dict[str, Tensor]:
        """Effective sample size of the window, by name and coordinate: the iterates' variance over ``mcse`` squared.

        Raises:
            ScorefnError: as ``mcse``.
        """
        return self._unflattened(self._ess())

    @contextmanager
    def applied(self, source: HasParameters) -> Iterator[None]:
        """Give the parameters the average inside the ``with``, and their own values back after it, come what may.

        Raises:
            ScorefnError: there are no iterates yet.
            ShapeError: other names or shapes than those of the iterates; nothing is changed.
        """
        own = {name: tensor.clone() for name, tensor in floating_tensors(source).items()}
        try:
            self.apply(source)
            yield
        finally:
            assign(own, source)

    def apply(self, source: HasParameters) -> None:
        """Give the parameters the average for good.

        Raises:
            ScorefnError: there are no iterates yet.
            ShapeError: other names or shapes than those of the iterates; nothing is changed.
        """
        average = self.average()
        self._check({name: tensor.shape for name, tensor in floating_tensors(source).items()})
        assign(average, source)

    def state_dict(self) -> dict[str, Any]:
        """Everything that ``load_state_dict`` needs to go on, in tensors and numbers."""
        empty = torch.zeros(0, self._mean.numel(), dtype=torch.float64)
        return {
            "names": list(self._shapes),
            "shapes": [list(shape) for shape in self._shapes.values()],
            "dtypes": [str(dtype).removeprefix("torch.") for dtype in self._dtypes.values()],
            "length": self._length,
            "means": torch.stack(self._means) if self._means else empty,
            "squares": torch.stack(self._squares) if self._squares else empty.clone(),
            "count": self._count,
            "mean": self._mean.clone(),
            "square": self._square.clone(),
            "updates": self._updates,
            "start": self._start,
            "converged": self._converged,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from where ``state_dict`` was taken; the limits are this object's own.

        Raises:
            ScorefnError: entries are missing or do not fit each other; this object stays as it was.
        """
        wanted = list(self.state_dict())
        if missing := [key for key in wanted if key not in state]:
            raise ScorefnError(f"The state lacks {missing}: it is none of IterateAverage.state_dict().")
        shapes = [torch.Size(shape) for shape in state["shapes"]]
        blocks, P = len(state["means"]), sum(shape.numel() for shape in shapes)
        found = [tuple(state[key].shape) for key in ("means", "squares", "mean", "square")]
        start, seen = state["start"], blocks * state["length"] + state["count"]
        fits = found == [(blocks, P), (blocks, P), (P,), (P,)] and len(state["names"]) == len(shapes)
        if not fits or blocks >= self.max_blocks or state["updates"] != seen or (start or 0) > blocks:
            raise ScorefnError(
                f"The state does not fit together: {len(state['names'])} names for {P} coordinates, tensors of shapes "
                f"{found}, {blocks} blocks where fewer than {self.max_blocks} are kept, {state['updates']} updates "
                f"where the blocks hold {seen}. Load what state_dict() returned, with the same max_blocks."
            )
        self._shapes = dict(zip(state["names"], shapes, strict=True))
        self._dtypes = {
            name: getattr(torch, dtype) for name, dtype in zip(state["names"], state["dtypes"], strict=True)
        }
        self._length, self._count, self._updates = state["length"], state["count"], state["updates"]
        self._means, self._squares = ([row.clone() for row in state[key].double()] for key in ("means", "squares"))
        self._mean, self._square = state["mean"].double().clone(), state["square"].double().clone()
        self._start, self._converged = start, state["converged"]

    def _first(self) -> int:
        """The first block of the window."""
        return len(self._means) // 2 if self._start is None else self._start

    def _look(self) -> None:
        """The rule, once."""
        if self._start is not None and float(self._r_hat(self._start).max()) > self.max_r_hat:
            self._start = None
        if self._start is None:
            least = max(self.min_window // self._length, _LEAST_HALVES)
            most = max(least, int(0.95 * len(self._means)))
            sizes = {least + (most - least) * i // (_WINDOWS - 1) for i in range(_WINDOWS)}
            r_hats = {size: float(self._r_hat(len(self._means) - size).max()) for size in sorted(sizes)}
            best = min(r_hats, key=lambda size: r_hats[size])
            if r_hats[best] <= self.max_r_hat:
                self._start = len(self._means) - best
        self._converged = self._start is not None and self._precise()

    def _precise(self) -> bool:
        if len(self._means) - self._first() < _LEAST_BLOCKS:
            return False
        error, units = self.mcse(), {} if self.scale is None else self.scale(self.average())
        if unknown := sorted(set(units) - set(error)):
            raise ScorefnError(f"scale returned units for {unknown}, but the parameters are {sorted(error)}.")
        relative = [value / units[name].double() if name in units else value for name, value in error.items()]
        return bool((self._ess() >= self.min_ess).all()) and all(bool((e < self.max_mcse).all()) for e in relative)

    def _r_hat(self, first: int) -> Tensor:
        """``[P]``, of the halves of the window; of an odd number of blocks the oldest is left out."""
        half = (len(self._means) - first) // 2
        n = half * self._length
        halves = [self._pooled(len(self._means) - 2 * half, half), self._pooled(len(self._means) - half, half)]
        (m1, s1), (m2, s2) = halves
        within, between = (s1 + s2) / (2 * (n - 1)), (m1 - m2).square() / 2
        ratio = torch.where(between > 0, between / within, 0.0)  # infinite where only the means differ
        return ((n - 1) / n + ratio).sqrt()

    def _pooled(self, first: int, number: int) -> tuple[Tensor, Tensor]:
        """Mean and sum of squared deviations of the iterates of some blocks, ``[P]`` each."""
        means, squares = (torch.stack(a[first : first + number]) for a in (self._means, self._squares))
        mean = means.mean(0)
        return mean, squares.sum(0) + self._length * (means - mean).square().sum(0)

    def _error_squared(self) -> Tensor:
        """``[P]``, of the average over the window."""
        blocks = len(self._means) - self._first()
        if blocks < _LEAST_BLOCKS:
            raise ScorefnError(
                f"There are {blocks} blocks of {self._length} iterates in the window, but a standard error needs "
                f"{_LEAST_BLOCKS}: go on with update(...)."
            )
        single, double = lugsail(torch.stack(self._means[self._first() :]))
        return torch.maximum(double, 2 * double - single)

    def _ess(self) -> Tensor:
        """``[P]``; a coordinate that never moved counts in full."""
        error, n = self._error_squared(), self.window
        variance = self._pooled(self._first(), len(self._means) - self._first())[1] / (n - 1)
        return torch.where(error > 0, variance / error, float(n))

    def _merge(self) -> None:
        """Blocks of twice the length; the window then starts with a full one."""
        pairs = range(0, len(self._means), 2)
        means, squares = self._means, self._squares
        self._squares = [
            squares[i] + squares[i + 1] + (means[i] - means[i + 1]).square() * (self._length / 2) for i in pairs
        ]
        self._means = [(means[i] + means[i + 1]) / 2 for i in pairs]
        self._length *= 2
        if self._start is not None:
            self._start = (self._start + 1) // 2

    def _unflattened(self, flat: Tensor) -> dict[str, Tensor]:
        parts = flat.split([shape.numel() for shape in self._shapes.values()])
        return {name: part.reshape(shape) for part, (name, shape) in zip(parts, self._shapes.items(), strict=True)}

    def _check(self, shapes: Mapping[str, torch.Size]) -> None:
        if shapes != self._shapes:
            names = sorted(set(shapes) ^ set(self._shapes))
            changed = [name for name in shapes if name in self._shapes and shapes[name] != self._shapes[name]]
            raise ShapeError(
                "These are other parameters than those that were averaged: "
                + (f"{names} are not in both. " if names else "")
                + "".join(f"{n} is {tuple(shapes[n])} but was {tuple(self._shapes[n])}. " for n in changed)
                + "One IterateAverage belongs to one set of parameters: call reset(), or make another."
            )
