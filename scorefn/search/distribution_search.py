"""Search with any distribution that torch can sample and score."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.distributions import Distribution

from scorefn.core import (
    Baseline,
    Coupling,
    Draws,
    NonFiniteError,
    ScorefnError,
    ShapeError,
    check_support,
    joint_log_prob,
    surrogate,
)
from scorefn.fisher import fisher_information
from scorefn.search.distribution_parts import check_parts, checked_parameters, is_discrete, spread
from scorefn.search.evaluation import check_switch
from scorefn.search.parameter_fisher import root_fisher
from scorefn.search.points import Numbers, as_numbers, as_values
from scorefn.search.ranking import Ranking
from scorefn.search.stopping import Limits
from scorefn.search.strategy import Diverged, State, Strategy, checked_popsize
from scorefn.search.trust_region import TrustRegion, discrete_limits
from scorefn.shaping import NESUtilities

_RATE = 0.05


class JointEstimator(Protocol):
    """What draws points together and estimates the gradient of a mean from them, as those of ``scorefn`` do."""

    def sample(self, p: Distribution, /) -> Tensor:
        """The points, ``[N, *batch, *event]``."""
        ...

    def surrogate(self, p: Distribution, x: Tensor, fx: Tensor, /) -> Tensor:
        """A scalar of values fx ``[N]`` at x whose gradient is the estimate."""
        ...


class DistributionSearch(Strategy):
    """Minimise by score-function gradients of any distribution: what is searched is what it can draw.

    With p the distribution that ``make`` builds from the parameters theta, and u = shape(-f)::

        g = 1/N sum_k (u_k - b_k) grad log p(x_k)                the estimate of grad E u, by autograd
        plain    theta <- one step of the optimiser along g
        natural  theta <- theta + r F^-1 g / sqrt(g^T F^-1 g)    r: radius of a trust region, by signal-to-noise ratio

    F is the Fisher information in theta: ``J^T F_eta J``, with F_eta the closed form of ``fisher_information(p)`` in
    the parameters eta of the family and J the Jacobian of eta in theta; directions in which p does not change are left
    out. Given an optimiser as well, ``F^-1 g`` is what it follows.

    With ranks (``NESUtilities``, ``CenteredRank``) only the order of f enters, and NaN or infinite values rank last.
    Where all values are tied nothing moves. Parameters are changed in place. Points are ``[N, *batch, *event]`` in p's
    own dtype; with a coupling they are told in the order of ``ask``. ``tell`` also refuses points that p cannot score,
    a failure that the shape cannot rank, and a step that would leave p's domain; parameters and optimiser are then as
    before.

    Source: Wierstra et al. (2014), "Natural evolution strategies", JMLR 15, section 2, for search gradients of any
    family; Akimoto et al. (2019), "Adaptive stochastic natural gradient method", ICML, for the trust region.

    Args:
        make: builds p from the parameters, called anew for each generation: a ``torch.distributions`` object, whose
            batch dimensions are taken as coordinates of one point.
        parameters: tensors that require grad and may take any value; what is bounded is for ``make`` to map (by
            ``exp``, ``softplus``, ``softmax``).
        popsize: N.
        optimizer: over the same tensors, that descends on their ``grad``; None: ``Adam(parameters, lr=0.05)``, or with
            ``natural`` the trust region.
        shape: of the values, larger being better; None: ``-f`` itself, with ``baseline=LeaveOneOut()`` an unbiased
            gradient.
        baseline: subtracted from the shaped values; None: none, as utilities sum to zero.
        coupling: how the draws of a generation share randomness; None: independent.
        estimator: makes the N points of a generation together and the gradient of their shaped values, such as
            ``DisARM(num_pairs)`` with ``popsize = 2 num_pairs``; told in the order of ``ask``, which holds who is whose
            partner. None: independent or coupled draws, as above.
        natural: follow the natural gradient; p must be of a family that ``fisher_information`` knows.
        seed: as for ``SNES``; torch's global generator is left as it was.
        limits: as for ``CategoricalSearch``.

    Raises:
        ScorefnError: no parameters, one that does not require grad or is there twice, or an optimiser over others;
            make returns no distribution; no Fisher information is known; an argument that cannot be used; as for
            ``SNES``.
        SupportError: the support of p moves with a parameter.

    Example:
        >>> import torch
        >>> from scorefn.search import DistributionSearch
        >>> loc, log_scale = torch.zeros(2, requires_grad=True), torch.zeros(2, requires_grad=True)
        >>> strategy = DistributionSearch(
        ...     lambda: torch.distributions.Laplace(loc, log_scale.exp()),
        ...     [loc, log_scale],
        ...     popsize=20,
        ...     natural=True,
        ...     seed=0,
        ...     ftarget=1e-6,
        ... )
        >>> while not strategy.stop:
        ...     x = strategy.ask()
        ...     strategy.tell(x, (x - 3.0).square().sum(1))
        >>> strategy.stop
        {'ftarget': 1e-06}
    """

    method = "distribution"
    fits_products = False  # its points have the shape of p
    open_entries = frozenset({"sigma0"})  # NaN where p has no variance

    def __init__(
        self,
        make: Callable[[], Distribution],
        parameters: Iterable[Tensor],
        *,
        popsize: int,
        optimizer: torch.optim.Optimizer | None = None,
        shape: Callable[[Tensor], Tensor] | None = NESUtilities(),  # noqa: B008 - it has no state
        baseline: Baseline | None = None,
        coupling: Coupling | None = None,
        estimator: JointEstimator | None = None,
        natural: bool = False,
        seed: int | torch.Generator | None = None,
        **limits: float | None,
    ) -> None:
        self._parameters = checked_parameters(parameters, optimizer)
        check_parts(make, shape, baseline, coupling, estimator)
        check_switch("natural", natural)
        self._make = make
        with torch.enable_grad():
            p = self.distribution
            check_support(p)
        self._event = p.batch_shape + p.event_shape
        self._baseline, self._coupling, self._shaping, self._estimator = baseline, coupling, shape, estimator
        self._natural = natural
        if natural:
            fisher_information(p)
        if optimizer is None and not natural:
            optimizer = torch.optim.Adam(self._parameters, lr=_RATE)
        self._optimizer = optimizer
        self._block: Tensor | None = None
        self._together: Tensor | None = None  # the joint draw of the estimator
        count = sum(parameter.numel() for parameter in self._parameters)
        device = self._parameters[0].device
        super().__init__(
            {**TrustRegion(torch.zeros(count, dtype=torch.float64, device=device)).state(), "widest": 0.0},
            settings={},
            shape=(checked_popsize(popsize, 2, None), self._event.numel()),
            sigma0=spread(p, self._event.numel()),
            seed=seed,
            fixed={
                "family": type(p).__name__,
                "optimizer_kind": type(optimizer).__name__,
                "coupling": type(coupling).__name__,
                "estimator": repr(estimator),
                "natural": bool(natural),
            },
            limits=Limits.of_options(
                discrete_limits(limits),
                "DistributionSearch",
                ("popsize", "optimizer", "shape", "baseline", "coupling", "estimator", "natural", "seed"),
            ),
        )

    @property
    def distribution(self) -> Distribution:
        """p as it is now, a function of the parameters."""
        p = self._make()
        if not isinstance(p, Distribution):
            raise ScorefnError(f"make must return a torch.distributions object, but it returned {type(p).__name__}.")
        return p

    @property
    def mean(self) -> Tensor:
        """``[*batch, *event]``, the mean of p, or where it has none, or is discrete, its mode; else the best point."""
        with torch.no_grad():
            p = self.distribution
            for name in ("mode", "mean") if is_discrete(p) else ("mean", "mode"):
                try:
                    point: Tensor = getattr(p, name).detach().clone()
                except (NotImplementedError, AttributeError):
                    continue
                if bool(point.isfinite().all()):
                    return point
        best = self._progress.best_x
        return torch.full(self._event, torch.nan) if best is None else best.view(self._event)

    @property
    def continuous_mean(self) -> Tensor:
        """``[D]``, the mean; NaN where points are discrete."""
        if is_discrete(self.distribution):
            return torch.full_like(self._sigma0, torch.nan)
        return self.mean.flatten().double()

    @property
    def sigma(self) -> Tensor:
        """``[D]``, the standard deviations of p, D the numbers of a point; NaN where there is no finite one."""
        return spread(self.distribution, self._shape[1])

    def sampled(self) -> Tensor:
        """``[N, *batch, *event]``, in p's own dtype."""
        device = self._generator.device
        seed = int(torch.randint(2**62, (), generator=self._generator, device=device))
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(seed)
            p = self.distribution
            if self._estimator is not None:
                return self._jointly(p, self._estimator)
            if self._coupling is None:
                self._block = None
                drawn: Tensor = p.sample(torch.Size((self.popsize,)))
                return drawn
            points, self._block = self._coupling.sample(p, self.popsize)
            return torch.as_tensor(points).detach()

    def _jointly(self, p: Distribution, estimator: JointEstimator) -> Tensor:
        points = estimator.sample(p)
        if len(points) != self.popsize:
            raise ScorefnError(
                f"{estimator!r} draws {len(points)} points of this distribution, but popsize is {self.popsize}: a "
                f"generation is one joint draw. Use popsize={len(points)}, or an estimator of {self.popsize} draws."
            )
        self._together = points.detach().clone()
        return points.detach()

    def learnt(self, points: Tensor, ranking: Ranking) -> State:
        """One step of the parameters, taken back at once: the region, the parameters and the optimiser after it."""
        before = self._remembered()
        try:
            region = self._step(points, ranking.values)
            parameters = [parameter.detach().clone() for parameter in self._parameters]
            optimizer = None if self._optimizer is None else self._optimizer.state_dict()
        finally:
            self._restore(*before)  # by other tensors: those of the state after it are left alone
        return {"region": region, "parameters": parameters, "optimizer": optimizer}

    def adopt(self, state: State) -> None:
        """Move the parameters to where ``learnt`` found them to go."""
        if state is not self._state:
            super().adopt(state["region"])
            self._restore(state["parameters"], state["optimizer"])
            self._block = None

    def told(self, x: Numbers) -> Tensor:
        """The points, ``[N, *batch, *event]``, checked."""
        points = as_numbers(x, "x", self._sigma0.device, None)
        if points.shape != (self.popsize, *self._event):
            raise ShapeError(
                f"tell needs the points x of a whole generation, {(self.popsize, *self._event)}, but x has shape "
                f"{tuple(points.shape)}. Pass what ask returned."
            )
        if not bool(points.isfinite().all()):
            raise Diverged(
                "The told points are not finite: pass those that were evaluated. Where ask drew them so, the "
                "distribution has left what their dtype can hold: start anew."
            )
        return points.detach()

    def scored(self, x: Numbers, f: Numbers) -> Draws:
        """The generation as draws of ``distribution``, for ``surrogate``, ``natural_gradient`` and the diagnostics.

        ``fx`` are the shaped values ``[N, 1]``, larger being better: they are *ascended* while f is minimised.

        Args:
            x: ``[N, *batch, *event]``.
            f: ``[N]``.
        """
        return self._scored(self.distribution, self.told(x), as_values(f, self.popsize, self._sigma0.device))

    def state_dict(self) -> dict[str, Any]:
        """As for every strategy, with the parameters and the state of the optimiser."""
        parameters, optimizer = self._remembered()
        return {**super().state_dict(), "parameters": parameters, "optimizer": optimizer}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state: the run then equals an uninterrupted one to the bit. Parameters are changed in place.

        Raises:
            ScorefnError: as for every strategy; the parameters or the optimiser cannot take the state. Nothing is then
                changed.
        """
        self.check_state(state)
        before = self.state_dict()
        try:
            self._restore(state["parameters"], copy.deepcopy(state["optimizer"]))
            super().load_state_dict(state)
        except Exception as error:
            self._restore(before["parameters"], before["optimizer"])
            super().load_state_dict(before)
            raise ScorefnError(f"The state does not fit this search: {error}") from error

    def _scored(self, p: Distribution, points: Tensor, values: Tensor) -> Draws:
        try:
            log_prob = p.log_prob(points)
        except ValueError as error:
            raise ScorefnError(
                f"{type(p).__name__} cannot score the told points ({error}). Tell points of its support."
            ) from error
        joint = joint_log_prob(log_prob, values)
        fx = -values if self._shaping is None else self._shaping(-values.unsqueeze(1)).squeeze(1)
        fx = fx.to(joint.dtype)
        if self._shaping is None and bool((failed := ~fx.isfinite()).any()):
            raise NonFiniteError(
                f"The told values are not finite in {fx.dtype} at {int(failed.sum())} of {len(fx)} points, namely "
                f"{failed.nonzero().flatten().tolist()[:10]}: with shape=None the gradient is that of the values "
                "themselves, and a failure has none. Tell a finite value, or rank them by shape=NESUtilities(), which "
                "puts failures last."
            )
        return Draws(points, joint, fx.unsqueeze(-1), block=self._block)

    def _step(self, points: Tensor, values: Tensor) -> State:
        """Move the parameters; the region after it."""
        with torch.enable_grad():
            p = self.distribution
            draws = self._scored(p, points, values)
            if self._estimator is None:
                objective = surrogate(draws, baseline=self._baseline).mean()
            else:
                self._check_together(points)
                objective = self._estimator.surrogate(p, draws.x, draws.fx.squeeze(-1))
            gradient = torch.autograd.grad(objective, self._parameters, materialize_grads=True, retain_graph=True)
            flat = torch.cat([entry.flatten().double() for entry in gradient])
            if not bool(flat.isfinite().all()):
                raise Diverged("The gradient of the told points is not finite: tell points near those of ask.")
            state = self._state
            if self._natural:
                roots, axes = root_fisher(p, self._parameters, state["widest"])
                if not len(roots):  # all is decided
                    return state
                widest = max(state["widest"], float(roots.amax()) ** 2)
                whitened = (axes.T @ flat) / roots
                if self._optimizer is None:
                    followed = TrustRegion.of_state(state).step(axes @ whitened, len(roots))
                    if followed is None:
                        return state
                    step, region = followed
                    whitened, state = axes.T @ step, {**region.state(), "widest": widest}
                flat = axes @ (whitened / roots)
        pieces = flat.split([parameter.numel() for parameter in self._parameters])
        self._move([piece.view_as(own).to(own) for piece, own in zip(pieces, self._parameters, strict=True)])
        self._check_step()
        return state

    def _move(self, direction: list[Tensor]) -> None:
        if self._optimizer is None:
            with torch.no_grad():
                for parameter, change in zip(self._parameters, direction, strict=True):
                    parameter += change
            return
        kept = [parameter.grad for parameter in self._parameters]
        try:
            for parameter, change in zip(self._parameters, direction, strict=True):
                parameter.grad = -change
            self._optimizer.step()
        finally:
            for parameter, gradient in zip(self._parameters, kept, strict=True):
                parameter.grad = gradient

    def _check_together(self, points: Tensor) -> None:
        if self._together is None or not torch.equal(points.to(self._together), self._together):
            raise ScorefnError(
                f"{self._estimator!r} compares the points of one joint draw by their places, but the told points are "
                "not those that ask returned last, in its order. Tell them as they were asked; points of your own need "
                "a search without estimator."
            )

    def _check_step(self) -> None:
        if not all(bool(parameter.isfinite().all()) for parameter in self._parameters):
            raise Diverged("This generation would make a parameter infinite: lower the learning rate.")
        try:
            self._make()
        except ValueError as error:
            raise ScorefnError(
                f"After this step make raises ({error}): a parameter has left the domain of the distribution. Let make "
                "map parameters of any value into it, by exp, softplus or softmax."
            ) from error

    def _remembered(self) -> tuple[list[Tensor], Any]:
        """Copies of the parameters and of the optimiser's state."""
        state = None if self._optimizer is None else copy.deepcopy(self._optimizer.state_dict())
        return [parameter.detach().clone() for parameter in self._parameters], state

    @torch.no_grad()
    def _restore(self, parameters: list[Tensor], optimizer: Any) -> None:
        for parameter, value in zip(self._parameters, parameters, strict=True):
            parameter.copy_(value)
        if self._optimizer is not None:
            self._optimizer.load_state_dict(optimizer)
