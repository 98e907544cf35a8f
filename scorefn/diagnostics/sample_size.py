"""How many draws the next step should take, so that its gradient is as clear as it is wanted."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from scorefn.core import ScorefnError, check_count
from scorefn.diagnostics.halves import moments

_STEP = 2.0  # by which one update multiplies or divides the number of draws at most
_ROUNDING = 1e-9  # of a number of draws that is meant to be whole


class SampleSize:
    """A number of draws that follows the noise: as many as a target signal-to-noise ratio needs, no more.

    The mean over N draws has the ratio ``|g|^2 / (V/N)``, V the total variance of one draw, so that ::

        N = target * V / |g|^2

    is enough. This is the norm test of Byrd, Chin, Nocedal & Wu (2012), "Sample size selection in optimization methods
    for machine learning", section 3, ``V/N <= theta^2 |g|^2``, with ``target = 1/theta^2``. |g|^2 and V are each
    measured without bias from the two halves of a batch, and smoothed apart before they are divided: a ratio of single
    measurements would be biased, and often has no sign.

    The inner product test of Bollapragada, Byrd & Nocedal (2018), "Adaptive sampling strategies for stochastic
    optimization", section 2, ``Var(g_i . g)/N <= theta^2 |g|^4``, has the same form and asks for less: hand ``update``
    |g|^4 as the signal and Var(g_i . g) as the variance.

    A change below ``hysteresis`` is not made, one update at most doubles or halves N, and N stays within ``least`` and
    ``most``; ``out_of_reach`` says that ``most`` is not enough, as it comes to be where |g| goes to 0. A step's draws
    choose N for later steps only, so that each estimate keeps its expectation.

    Args:
        target: the signal-to-noise ratio to keep, above 0; 1: signal as large as noise. theta = .5 is 4.
        least: N is never below; leave-one-out needs 2. It starts there.
        most: N is never above.
        multiple: N is a multiple of it, as couplings ask for: 2 with ``Antithetic()``.
        decay: of the smoothing, in [0, 1): weight of the past, per measurement.
        hysteresis: N stays while what is wanted is within this factor of it, 1 or more.
        every: ``observe`` measures at its first call, and then at each such call, as a measurement costs about one
            backward pass.

    Raises:
        ScorefnError: a number out of its range, or no multiple between least and most.

    Example:
        >>> import torch, scorefn as sf
        >>> from scorefn.diagnostics import SampleSize
        >>> _ = torch.manual_seed(0)
        >>> logits = torch.zeros(5, requires_grad=True)
        >>> size = SampleSize(target=4.0, least=8, most=512, every=5)
        >>> for _ in range(30):
        ...     p = torch.distributions.Bernoulli(logits=logits)
        ...     draws = sf.draw(p, lambda x: (x - 0.45).square().sum(-1), size.num_samples)
        ...     surrogate = sf.surrogate(draws, baseline=sf.LeaveOneOut())  # [N]
        ...     size.observe(surrogate, logits)
        ...     surrogate.mean().backward()
        >>> size.num_samples > 8
        True
    """

    def __init__(
        self,
        target: float,
        *,
        least: int = 2,
        most: int,
        multiple: int = 1,
        decay: float = 0.9,
        hysteresis: float = 1.2,
        every: int = 20,
    ) -> None:
        self.target = _number("target", target)
        if self.target <= 0:
            raise ScorefnError(f"target must be above 0, but it is {target!r}: a signal-to-noise ratio is positive.")
        self.least, self.most = check_count("least", least), check_count("most", most)
        self.multiple, self.every = check_count("multiple", multiple), check_count("every", every)
        self.decay, self.hysteresis = _number("decay", decay), _number("hysteresis", hysteresis)
        if not 0 <= self.decay < 1:
            raise ScorefnError(f"decay must lie in [0, 1), but it is {decay!r}: 0 forgets, .9 averages about 10.")
        if self.hysteresis < 1:
            raise ScorefnError(f"hysteresis must be a factor of 1 or more, but it is {hysteresis!r}.")
        if self._up(self.least) > self._down(self.most):
            raise ScorefnError(
                f"There is no multiple of {self.multiple} from least={self.least} to most={self.most}, so N has no "
                "value. Raise most."
            )
        self._num_samples = self._up(self.least)
        self._signal = self._variance = self._weight = 0.0
        self._calls = 0

    @property
    def num_samples(self) -> int:
        """N, for the next step."""
        return self._num_samples

    @property
    def noise_scale(self) -> float:
        """``V / |g|^2``, smoothed: as many draws have as much noise as signal. Infinite without signal, NaN before."""
        if self._weight == 0:
            return math.nan
        if self._variance <= 0:
            return 0.0
        return self._variance / self._signal if self._signal > 0 else math.inf

    @property
    def signal_to_noise(self) -> float:
        """The ratio that N draws are expected to have."""
        scale = self.noise_scale
        return math.inf if scale == 0 else self.num_samples / scale

    @property
    def out_of_reach(self) -> bool:
        """Whether ``most`` draws would not reach the target: no more of them are taken, and the ratio stays below."""
        return self.target * self.noise_scale > self._down(self.most)

    def observe(
        self,
        surrogate: Tensor,
        params: Tensor | Iterable[Tensor],
        *,
        block: Tensor | None = None,
        gradient: Iterable[Tensor] | None = None,
    ) -> None:
        """Measure signal and variance on this step's draws, every so many calls; choose N for the next step.

        Call it before the backward pass that frees the graph. Two backward passes, one where the gradient is given.

        Args:
            surrogate: ``[N, *B]``, one value per draw, before the mean.
            params: the tensors to differentiate.
            block: ``[N]`` int, draws that depend on each other (``draws.block``); None: each its own.
            gradient: that of the mean over draws (of the sum over B), where it is known.

        Raises:
            ScorefnError, ShapeError, NonFiniteError: as ``split_halves``; nothing is learnt then.
        """
        if self._calls % self.every == 0:
            found = moments(surrogate, params, block=block, gradient=gradient)
            self.update(found.agreement, found.variance)
        self._calls += 1

    def update(self, signal: float, variance: float) -> None:
        """Choose N from a measurement that is at hand.

        Args:
            signal: |g|^2, best without bias: it may be negative by chance.
            variance: V, of one draw, over all coordinates: N times that of the mean.

        Raises:
            ScorefnError: NaN, infinite, or a negative variance; nothing is learnt then.
        """
        signal, variance = _number("signal", signal), _number("variance", variance)
        if variance < 0:
            raise ScorefnError(f"variance must not be negative, but it is {variance!r}.")
        self._signal = self.decay * self._signal + (1 - self.decay) * signal
        self._variance = self.decay * self._variance + (1 - self.decay) * variance
        self._weight = self.decay * self._weight + (1 - self.decay)
        wanted, now = self.target * self.noise_scale, self._num_samples
        if now / self.hysteresis <= wanted <= now * self.hysteresis:
            return
        bounded = min(max(wanted, now / _STEP, self.least), now * _STEP, self.most)
        self._num_samples = min(
            max(self._up(math.ceil(bounded * (1 - _ROUNDING))), self._up(self.least)), self._down(self.most)
        )

    def state_dict(self) -> dict[str, Any]:
        """What was learnt, and N."""
        return {
            "num_samples": self._num_samples,
            "signal": self._signal,
            "variance": self._variance,
            "weight": self._weight,
            "calls": self._calls,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state; all of it or, where it is refused, nothing.

        Raises:
            ScorefnError: keys that are missing or unknown, a value that no run leaves behind, or an N that the present
                least, most and multiple exclude.
        """
        names = self.state_dict().keys()
        if not isinstance(state, Mapping) or set(state) != set(names):
            found = sorted(map(str, state)) if isinstance(state, Mapping) else type(state).__name__
            raise ScorefnError(f"The state of a SampleSize has {sorted(names)}, but this one has {found}.")
        N = check_count("num_samples", state["num_samples"])
        if not self._up(self.least) <= N <= self.most or N % self.multiple:
            raise ScorefnError(
                f"The state has num_samples = {N}, but here it is a multiple of {self.multiple} from {self.least} to "
                f"{self.most}: load it into a SampleSize of the same settings."
            )
        signal, variance, weight = (_number(name, state[name]) for name in ("signal", "variance", "weight"))
        calls = state["calls"]
        if variance < 0 or not 0 <= weight <= 1 or not isinstance(calls, int) or isinstance(calls, bool) or calls < 0:
            raise ScorefnError(
                f"The state has variance = {variance}, weight = {weight} and calls = {calls!r}, but they are not "
                "negative, the weight is at most 1 and calls is an integer: this is not a state that was saved."
            )
        self._num_samples, self._calls = N, calls
        self._signal, self._variance, self._weight = signal, variance, weight

    def __repr__(self) -> str:
        """Where it stands."""
        reach = ", out of reach" if self.out_of_reach else ""
        return f"SampleSize(num_samples={self._num_samples}, SNR {self.signal_to_noise:.3g} of {self.target:g}{reach})"

    def _up(self, count: int) -> int:
        return -(-count // self.multiple) * self.multiple

    def _down(self, count: int) -> int:
        return count // self.multiple * self.multiple


def _number(name: str, value: Any) -> float:
    """A finite number."""
    try:
        number = math.nan if isinstance(value, bool | str) else float(value)
    except (TypeError, ValueError, RuntimeError):
        number = math.nan
    if not math.isfinite(number):
        raise ScorefnError(f"{name} must be a finite number, but it is {value!r}.")
    return number
