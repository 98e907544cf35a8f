"""Policies: modules that map observations to a distribution over actions.

The environment sees an action through the method ``executed``, where a policy has one; what is stored and scored is
the action before that. ``act`` draws from the same distribution as ``forward`` returns, without building it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Bernoulli, Categorical, Distribution, Independent, Normal

from scorefn.core import PyTree, ScorefnError, ShapeError
from scorefn.trajectories.bounds import Clip, Tanh
from scorefn.trajectories.multi_categorical import MultiCategorical, check_counts, check_logits, raced


class CategoricalPolicy(nn.Module):
    """A policy over finitely many actions: ``Categorical(logits=network(observations))``.

    Args:
        network: ``[*batch, *obs] -> [*batch, A]``, the logits of A actions.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from scorefn.trajectories import CategoricalPolicy
        >>> policy = CategoricalPolicy(nn.Linear(4, 2))
        >>> policy(torch.zeros(3, 4)).logits.shape
        torch.Size([3, 2])
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, observations: PyTree) -> Categorical:
        """The distribution of the actions, batch shape ``[*batch]``."""
        return Categorical(logits=self.network(observations), validate_args=False)

    @torch.no_grad()
    def act(self, observations: PyTree) -> Tensor:
        """A draw of ``self(observations)`` ``[*batch]``, without building it.

        Independent exponential clocks of rate ``exp(logits)`` race: action a rings first with probability
        ``softmax(logits)_a`` (Gumbel, 1954; Maddison, Tarlow & Minka, 2014).
        """
        logits: Tensor = self.network(observations)
        return logits.sub(torch.empty_like(logits).exponential_().log_()).argmax(-1)


class MultiCategoricalPolicy(nn.Module):
    """A policy of D choices made at once, for MultiDiscrete: ``MultiCategorical(counts, network(observations))``.

    ``log p(a) = sum_d log softmax(logits_d)_(a_d)``: the choices are independent given the observation.

    Args:
        network: ``[*batch, *obs] -> [*batch, sum(counts)]``, the logits of all choices, one choice after the other.
        counts: D integers, the number of values of each choice: ``env.single_action_space.nvec``.

    Raises:
        ScorefnError: counts are no integers of at least 1, or none at all.
        ShapeError: (when called) the network returned another number of logits.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from scorefn.trajectories import MultiCategoricalPolicy
        >>> policy = MultiCategoricalPolicy(nn.Linear(4, 3 + 2), counts=[3, 2])
        >>> policy.act(torch.zeros(7, 4)).shape
        torch.Size([7, 2])
    """

    def __init__(self, network: nn.Module, counts: Iterable[int]) -> None:
        super().__init__()
        self.network, self.counts = network, check_counts(counts)

    def forward(self, observations: PyTree) -> MultiCategorical:
        """The distribution of the actions, batch shape ``[*batch]``, event shape ``[D]``."""
        return MultiCategorical(self.counts, self.network(observations), validate_args=False)

    @torch.no_grad()
    def act(self, observations: PyTree) -> Tensor:
        """A draw of ``self(observations)`` ``[*batch, D]``, without building it."""
        logits = self.network(observations)
        check_logits(logits, self.counts)
        return raced(logits, self.counts)


class BernoulliPolicy(nn.Module):
    """A policy of D switches, for MultiBinary: independent ``Bernoulli(logits=network(observations))``.

    ``log p(a) = sum_d a_d logits_d - softplus(logits_d)``.

    Args:
        network: ``[*batch, *obs] -> [*batch, D]``, the logits of 1.

    Raises:
        ShapeError: (when called) the network returned a number instead of D.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from scorefn.trajectories import BernoulliPolicy
        >>> policy = BernoulliPolicy(nn.Linear(4, 6))
        >>> policy(torch.zeros(3, 4)).event_shape
        torch.Size([6])
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, observations: PyTree) -> Distribution:
        """The distribution of the actions, batch shape ``[*batch]``, event shape ``[D]``."""
        return Independent(Bernoulli(logits=self._logits(observations), validate_args=False), 1, validate_args=False)

    @torch.no_grad()
    def act(self, observations: PyTree) -> Tensor:
        """A draw of ``self(observations)`` ``[*batch, D]``, the very one of its ``sample``, without building it."""
        return torch.bernoulli(self._logits(observations).sigmoid())

    def _logits(self, observations: PyTree) -> Tensor:
        logits: Tensor = self.network(observations)
        if logits.ndim == 0:
            raise ShapeError(
                "The network returned shape (), but it must return [*batch, D], one logit for each switch: for a "
                "single one let it return [*batch, 1]."
            )
        return logits


class GaussianPolicy(nn.Module):
    """A policy over real vectors: independent ``Normal(mean(h), exp(log_scale))``, ``h = trunk(observations)``.

    ``log p(u) = -sum_d (u_d - mean_d)^2 / (2 scale_d^2) + log scale_d + log(2 pi) / 2``.

    What is sampled, stored and scored is the unbounded u. Where ``bounds`` are given, the environment gets
    ``executed(u)``, clipped or squashed; ``executed_log_prob`` is the log-density of that.

    Args:
        mean: ``[*batch, *hidden] -> [*batch, *act]``.
        log_scale: the logarithm of the standard deviation. A module makes it depend on the observation,
            ``[*batch, *hidden] -> [*batch, *act]``. Anything else that ``torch.as_tensor`` takes, of shape ``[*act]``,
            is where a parameter of its own begins, learned and the same for every observation, in the dtype and on the
            device of mean; an ``nn.Parameter`` is kept as it is.
        trunk: what mean and a log_scale that is a module have in common, computed once; None: the observations
            themselves.
        bounds: ``Clip`` or ``Tanh``; None: the environment gets u itself.

    The shape of one action is that of a log_scale that is no module, or of the bounds; without either, an action is the
    last dimension of what mean returns.

    Raises:
        ScorefnError: log_scale is not a number, array or module, or bounds are neither ``Clip`` nor ``Tanh``.
        ShapeError: log_scale and bounds have different shapes; (when called) mean or log_scale returned another shape.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from scorefn.trajectories import GaussianPolicy, Tanh
        >>> policy = GaussianPolicy(
        ...     nn.Linear(4, 2), torch.zeros(2), bounds=Tanh([-1.0, 0.0], [1.0, 3.0])
        ... )
        >>> actions = policy.act(torch.zeros(5, 4))
        >>> policy(torch.zeros(5, 4)).log_prob(actions).shape
        torch.Size([5])
        >>> bool((policy.executed(actions)[:, 1] >= 0).all())
        True
        >>> depends = GaussianPolicy(
        ...     nn.Linear(8, 2), nn.Linear(8, 2), trunk=nn.Sequential(nn.Linear(4, 8), nn.Tanh())
        ... )
        >>> depends(torch.zeros(5, 4)).event_shape
        torch.Size([2])
    """

    def __init__(
        self, mean: nn.Module, log_scale: Any, *, trunk: nn.Module | None = None, bounds: Clip | Tanh | None = None
    ) -> None:
        super().__init__()
        self.mean, self.trunk, self.bounds = mean, trunk, bounds
        self.log_scale = log_scale if isinstance(log_scale, nn.Module) else _parameter(log_scale, mean)
        if bounds is not None and not isinstance(bounds, Clip | Tanh):
            raise ScorefnError(
                f"bounds is {type(bounds).__name__}, but how an action is bounded must be known to score it: use "
                "Clip.from_space(space) or Tanh.from_space(space)."
            )
        shapes = [] if isinstance(self.log_scale, nn.Module) else [self.log_scale.shape]
        shapes += [] if bounds is None else [bounds.low.shape]
        if len(set(shapes)) == 2:
            raise ShapeError(
                f"log_scale has shape {tuple(shapes[0])}, but the bounds are those of actions of shape "
                f"{tuple(shapes[1])}: give one number for each dimension of the action."
            )
        self._action_shape = shapes[0] if shapes else None  # None: any vector

    def forward(self, observations: PyTree) -> Distribution:
        """The distribution of the unbounded actions, batch shape ``[*batch]``, event shape ``[*act]``."""
        normal = self._normal(observations)
        ndim = self._action_ndim
        return Independent(normal, ndim, validate_args=False) if ndim else normal

    @torch.no_grad()
    def act(self, observations: PyTree) -> Tensor:
        """A draw of ``self(observations)`` ``[*batch, *act]``, the very one of its ``sample``, without building it."""
        mean, log_scale = self._location_and_log_scale(observations)
        return torch.randn_like(mean).mul_(log_scale.exp()).add_(mean)

    def executed(self, actions: Tensor) -> Tensor:
        """What the environment is given, ``[*batch, *act] -> [*batch, *act]``: bounded where there are bounds."""
        bounded: Tensor = actions if self.bounds is None else self.bounds(actions)
        return bounded

    def executed_log_prob(self, observations: PyTree, actions: Tensor) -> Tensor:
        """Log-density of ``executed(actions)``, ``[*batch]``; the actions are as they were sampled, unbounded.

        With ``Tanh`` its gradient in the parameters is the score of the unbounded action. With ``Clip`` the ends are
        atoms: there it is the logarithm of their probability, and its gradient another estimate of the same mean.

        Raises:
            ShapeError: actions are not ``[*batch, *act]``.
        """
        normal = self._normal(observations)
        if actions.shape != normal.batch_shape:
            raise ShapeError(
                f"The actions have shape {tuple(actions.shape)}, but these observations have actions of shape "
                f"[*batch, *act] = {tuple(normal.batch_shape)}."
            )
        if self.bounds is not None:
            return self.bounds.log_prob(normal, actions)
        log_prob: Tensor = Independent(normal, self._action_ndim, validate_args=False).log_prob(actions)
        return log_prob

    @property
    def _action_ndim(self) -> int:
        return 1 if self._action_shape is None else len(self._action_shape)

    def _normal(self, observations: PyTree) -> Normal:
        mean, log_scale = self._location_and_log_scale(observations)
        return Normal(mean, log_scale.exp(), validate_args=False)

    def _location_and_log_scale(self, observations: PyTree) -> tuple[Tensor, Tensor]:
        hidden = observations if self.trunk is None else self.trunk(observations)
        mean: Tensor = self.mean(hidden)
        shape, ndim = self._action_shape, self._action_ndim
        if mean.ndim < ndim or (shape is not None and mean.shape[mean.ndim - ndim :] != shape):
            wanted = "one dimension of actions at least" if shape is None else f"actions of shape {tuple(shape)}"
            raise ShapeError(
                f"mean returned shape {tuple(mean.shape)}, but it must return [*batch, *act] with {wanted}, as "
                "log_scale and the bounds have it."
            )
        if not isinstance(self.log_scale, nn.Module):
            return mean, self.log_scale
        log_scale: Tensor = self.log_scale(hidden)
        if log_scale.shape != mean.shape:
            raise ShapeError(
                f"log_scale returned shape {tuple(log_scale.shape)} and mean shape {tuple(mean.shape)}, but there must "
                "be one scale for each mean."
            )
        return mean, log_scale


def _parameter(log_scale: Any, mean: nn.Module) -> nn.Parameter:
    """A parameter that starts at log_scale, like those of mean."""
    if isinstance(log_scale, nn.Parameter):
        return log_scale
    like = next((parameter for parameter in mean.parameters() if parameter.is_floating_point()), torch.empty(0))
    try:
        start = torch.as_tensor(log_scale).detach().to(like, copy=True)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ScorefnError(
            f"log_scale is {type(log_scale).__name__}, but it must be a module, or numbers of the shape of one action "
            "where a learned parameter begins, such as torch.zeros(2)."
        ) from error
    return nn.Parameter(start)
