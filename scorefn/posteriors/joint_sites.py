"""Guide sites whose particles are drawn together, by an estimator of the site's own.

Given all joint draws, the particles are independent of each other: an estimator makes its draws from a distribution
that knows no particle, and every other site is drawn for each particle apart. Three things follow.

* With ``f_m`` the cost that the site influences in particle m, whose mean given ``x_m`` is the same function of ``x_m``
  for all m, and a surrogate that is linear in its values, ``surrogate(p, x, f)`` has the right expectation.
* The score of another site has mean zero given the joint draws and all other particles, those that are coupled with
  its own included. So a baseline made from other particles needs to leave out its own particle only.
* Where draws count by weights ``w_m``, in an order of their own, independent random orders for each element of each
  site make every particle alone a proper draw of weight ``N w`` at each element. A value is weighed by the product over
  the elements that influence it, as by importance weights, and what an element is charged with by the others' alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import pyro
import torch
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.distributions import Distribution, Independent

from scorefn.core import Baseline, Credit, Draws, NonFiniteError, ScorefnError, ShapeError, is_stateful
from scorefn.core.checks import no_part
from scorefn.core.surrogate import charge
from scorefn.estimators.estimator import Estimator
from scorefn.posteriors.checks import check_trainable

if TYPE_CHECKING:
    from scorefn.posteriors.particles import Particles

ALONE = "scorefn_alone"  # a site's distribution before it was spread over the particles
JOINT = "scorefn_joint"  # its draws


class ParticlePlate(pyro.plate):  # type: ignore[misc]
    """The plate around all others; it keeps each site's distribution as it was without the particles."""

    def _process_message(self, msg: Any) -> None:
        msg[ALONE] = msg["fn"]
        super()._process_message(msg)


@dataclass(frozen=True, eq=False)
class JointSite:
    """The joint draws of one site.

    Args:
        name: of the site.
        estimator: which made them.
        p: the distribution of one particle, whose batch dimensions are problems of their own.
        x: ``[N, *batch, *event]``, in the estimator's order.
        order: ``[N, *batch]``, which draw each particle has; None: that of its own number.
        log_weight: ``[N, *batch]`` of each particle, relative to equal weights; None: all draws count alike.
    """

    name: str
    estimator: Estimator
    p: Distribution
    x: Tensor
    order: Tensor | None = None
    log_weight: Tensor | None = None

    @property
    def value(self) -> Tensor:
        """``[N, *batch, *event]``, particle by particle."""
        if self.order is None:
            return self.x
        index = self.order.reshape(*self.order.shape, *[1] * (self.x.ndim - self.order.ndim))
        return self.x.gather(0, index.expand_as(self.x))

    def score(self, signal: Tensor) -> Tensor:
        """A scalar of value 0 whose gradient is the site's part of the gradient.

        Args:
            signal: ``[N, *batch]`` as one row of numbers for each particle, what each problem is charged with.

        Raises:
            ShapeError: the estimator returned another shape than that of its problems.
        """
        fx = signal.reshape(len(self.x), *self.p.batch_shape)
        if self.order is not None:
            fx = torch.zeros_like(fx).scatter(0, self.order, fx)
        found = self.estimator.surrogate(self.p, self.x, fx)
        if found.shape != self.p.batch_shape:
            raise ShapeError(
                f'{_named(self.estimator)} returned a surrogate of shape {tuple(found.shape)} for site "{self.name}", '
                f"whose problems, its batch dimensions, are {tuple(self.p.batch_shape)}: it must return one number for "
                "each problem."
            )
        return (found - found.detach()).sum()


class JointColumns(NamedTuple):
    """A joint site, the first column of its decisions, and how many there are."""

    site: JointSite
    start: int
    size: int


class JointReader(Messenger):  # type: ignore[misc]
    """Makes the draws of each guide site that has an estimator, before the site has a value.

    Args:
        estimators: by the site's name; a site may also carry one itself, in ``infer={"estimator": ...}``.
        num_particles: N.
        num_together: how many of them run together.
        before: another handler that meets each site first.
    """

    def __init__(
        self, estimators: Mapping[str, Estimator], num_particles: int, num_together: int, before: Messenger
    ) -> None:
        super().__init__()
        self.estimators, self.num_particles, self.num_together = estimators, num_particles, num_together
        self._before = before._pyro_sample
        self._met = list[str]()

    def _pyro_sample(self, msg: Any) -> None:
        self._before(msg)
        name = msg["name"]
        own, given = msg["infer"].get("estimator"), self.estimators.get(name)
        if own is not None and given is not None:
            raise ScorefnError(
                f'Site "{name}" has the estimator {own!r} in its own infer={{"estimator": ...}} and {given!r} in '
                "ScoreFunctionELBO(estimators=...), and there is no telling which one to use. Give one of them."
            )
        if own is not None:
            given = check_estimator(f'infer["estimator"] of site "{name}"', own)
        if given is not None:
            self._sample(msg, given)
        if not site_is_subsample(msg):
            self._met.append(name)

    def close(self) -> None:
        """Refuse estimators of sites that do not exist.

        Raises:
            ScorefnError: the guide has not sampled a site that an estimator was given for.
        """
        if missing := [name for name in self.estimators if name not in self._met]:
            raise ScorefnError(
                f'ScoreFunctionELBO(estimators=...) has an estimator for "{missing[0]}", but the guide samples no site '
                f"of that name: it samples {_listed(self._met)}. Correct the name, or leave it out."
            )

    def _sample(self, msg: Any, estimator: Estimator) -> None:
        name, N, shown = msg["name"], self.num_particles, _named(estimator)
        if self.num_together < N:
            raise ScorefnError(
                f'Site "{name}" has the estimator {shown}, which draws all particles together, but with '
                "vectorize_particles=False they run one after the other, and Python may make the site depend on what "
                "was sampled before. Set vectorize_particles=True, or take the estimator off the site."
            )
        if msg["done"] or msg["is_observed"] or msg["value"] is not None:
            raise ScorefnError(
                f'Site "{name}" has the estimator {shown}, but its value is given (observed, replayed or conditioned), '
                "so there is nothing to draw. Take the estimator off the site."
            )
        if msg["infer"].get("baseline"):
            raise ScorefnError(
                f'Site "{name}" has the estimator {shown} and infer={{"baseline": ...}}, but an estimator compares its '
                "draws with each other and subtracts no other baseline. Give one of them."
            )
        p = self._alone(msg, shown)
        x, weights = _drawn(name, estimator, p)
        made = estimator.evaluations
        if not isinstance(x, Tensor) or x.requires_grad or (made is not None and made < len(x)):
            raise ScorefnError(
                f"{shown} draws more than values of a site (it needs the cost at other points, or its gradient), but "
                f'the cost of site "{name}" is known at the particles alone. Use another estimator there, such as '
                "scorefn.DisARM or scorefn.ARMS, or none."
            )
        if len(x) != N:
            raise ScorefnError(
                f'The estimator {shown} makes {len(x)} draws of site "{name}", but num_particles is {N}, and each '
                f"particle has one of them. Set num_particles={len(x)}, or give the estimator as many draws."
            )
        if x.shape[1:] != p.batch_shape + p.event_shape:
            raise ShapeError(
                f'{shown} drew a tensor of shape {tuple(x.shape)} for site "{name}", but {N} draws of its distribution '
                f"are {(N, *p.batch_shape, *p.event_shape)}: it does not serve batch and event of this shape."
            )
        site = JointSite(name, estimator, p, x)
        if weights is not None:
            order = random_order((N, *p.batch_shape), x.device)
            site = JointSite(name, estimator, p, x, order, _log_weight(site, weights).gather(0, order))
        msg["value"] = site.value.reshape(msg["fn"].batch_shape + p.event_shape)
        msg["done"] = True
        msg[JOINT] = site

    def _alone(self, msg: Any, shown: str) -> Distribution:
        """The distribution of one particle, the same for all: it extends over plates, not over particles."""
        name, p = msg["name"], msg.get(ALONE, msg["fn"])
        if not isinstance(p, Distribution):
            raise ScorefnError(
                f'Site "{name}" has the estimator {shown}, but it is a {type(p).__name__}, not a torch or Pyro '
                "distribution with a batch shape. Take the estimator off the site."
            )
        batch = p.batch_shape
        if ALONE in msg:
            plates = len(msg["fn"].batch_shape) - 1  # the particles' dimension is the first
            if any(size != 1 for size in batch[: max(len(batch) - plates, 0)]):
                raise ScorefnError(
                    f'Site "{name}" has the estimator {shown}, which draws the {self.num_particles} particles together '
                    f"from one distribution, but its distribution has batch shape {tuple(batch)}, one for each "
                    f"particle: it depends on a site before it ({_listed(self._met)}), and different distributions "
                    "have no joint draw. Take the estimator off this site, and leave it to the score function; or make "
                    "its parameters from data and parameters alone, in shapes that broadcast."
                )
        return p if isinstance(p, Independent) else Independent(p, 0)  # which says: batch dimensions are problems


def check_estimators(estimators: Any) -> dict[str, Estimator]:
    """The estimators of sites by name.

    Raises:
        ScorefnError: no mapping from names to estimators.
    """
    if estimators is None:
        return {}
    if not isinstance(estimators, Mapping):
        raise ScorefnError(
            f"estimators={estimators!r} must be a mapping from names of guide sites to their estimators, such as "
            'estimators={"z": scorefn.DisARM()}.'
        )
    return {name: check_estimator(f'estimators["{name}"]', estimator) for name, estimator in estimators.items()}


def check_estimator(where: str, estimator: Any) -> Estimator:
    """Refuse a class, a name, or what is no estimator."""
    if not isinstance(estimator, Estimator):
        raise no_part(where, estimator, "give the estimator itself, such as scorefn.DisARM(num_pairs=4).")
    return estimator


def random_order(shape: tuple[int, ...], device: torch.device) -> Tensor:
    """Independent random orders along the first dimension."""
    return torch.rand(shape, dtype=torch.float64, device=device).argsort(0)


def estimate_jointly(particles: Particles, credit: Credit | None, baseline: Baseline | None) -> Tensor:
    """The bound of particles with joint sites, a scalar whose gradient is the estimate.

    The baseline is read, and updated, for the other sites only.

    Raises:
        ScorefnError: nothing is trainable; as ``Draws`` and as the baseline.
        NonFiniteError: log p or log q is NaN or infinite, with the site named.
    """
    assert particles.log_prob is not None
    log_prob, learns = particles.log_prob, torch.is_grad_enabled()
    if not particles.fx.requires_grad:
        check_trainable(particles.scored, log_prob)
    own = torch.zeros(log_prob.shape[-1], dtype=torch.bool, device=log_prob.device)
    weight = torch.zeros_like(log_prob, requires_grad=False)  # logarithms, 0 at columns of other sites
    for site, start, size in particles.joint:
        own[start : start + size] = True
        if site.log_weight is not None:
            weight[:, start : start + size] = site.log_weight.reshape(len(weight), size)
    weighted = any(site.log_weight is not None for site, _, _ in particles.joint)
    rest = torch.where(own, 0.0, log_prob)  # the scores of the others
    behaviour = rest.detach() - weight if weighted else None
    try:
        with torch.set_grad_enabled(learns and rest.requires_grad):  # where the guide is fixed, there is no score
            draws = Draws(particles.samples, rest, particles.fx, credit=particles.credit, behaviour_log_prob=behaviour)
    except NonFiniteError as error:
        raise particles.not_finite() or error from None
    if bool(own.all()) or not rest.requires_grad:
        baseline = None
    per_draw, signal, draws = charge(draws, credit, baseline)
    if baseline is not None and learns and is_stateful(baseline):
        baseline.update(signal, draws)
    bound = per_draw.mean()
    if not (learns and log_prob.requires_grad):
        return bound
    signal = signal.expand(log_prob.shape)
    if weighted:
        signal = signal / weight.exp()
    for site, start, size in particles.joint:
        bound = bound + site.score(signal[:, start : start + size])
    return bound


def _drawn(name: str, estimator: Estimator, p: Distribution) -> tuple[Any, Tensor | None]:
    """Draws and their weights; None: they count alike."""
    try:
        with torch.enable_grad():  # whether it differentiates the cost shows in its draws
            x = estimator.sample(p)
        alike = type(estimator).weights is Estimator.weights or not isinstance(x, Tensor)
        return x, None if alike else estimator.weights(p, x).detach()
    except ScorefnError as error:
        raise type(error)(
            f'Guide site "{name}" has an estimator; without one, it has the score function. {error}'
        ) from error


def _log_weight(site: JointSite, weights: Tensor) -> Tensor:
    """``log(N w)``, ``[N, *batch]``; a weight of 0 becomes so small that nothing shows it, but its own value does."""
    shape = site.x.shape[: 1 + len(site.p.batch_shape)]
    if weights.ndim > len(shape) or weights.shape != shape[: weights.ndim]:
        raise ShapeError(
            f'{_named(site.estimator)} gave weights of shape {tuple(weights.shape)} to site "{site.name}", but they '
            f"must be [N, *batch] = {tuple(shape)}, or a leading part of it."
        )
    if not bool((weights >= 0).all() & torch.isfinite(weights).all()):
        raise ScorefnError(
            f'{_named(site.estimator)} gave site "{site.name}" a weight of {float(weights.min())}, but weights must '
            "be finite and at least 0 to weigh the other terms of the bound. Use another estimator there."
        )
    weights = weights.reshape(weights.shape + (1,) * (len(shape) - weights.ndim)).expand(shape)
    return (weights * len(weights)).clamp(min=torch.finfo(weights.dtype).eps ** 4).log()


def _named(estimator: Estimator) -> str:
    return type(estimator).__name__


def _listed(names: list[str]) -> str:
    quoted = [f'"{name}"' for name in names]
    return (", ".join(quoted[:10]) + (", ..." if len(quoted) > 10 else "")) or "none"
