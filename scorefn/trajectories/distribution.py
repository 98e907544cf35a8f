"""The distribution of whole episodes: a structured measure of T decisions and T values."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from scorefn.core import (
    Coupling,
    Credit,
    Draws,
    Independent,
    Integrand,
    ScorefnError,
    ShapeError,
    Total,
    check_support,
    evaluate,
)
from scorefn.reducers import RewardToGo
from scorefn.trajectories.record import Trajectories
from scorefn.trajectories.rollouts import Environment, rollout
from scorefn.trajectories.spaces import action_distribution, check_environment, check_policy


class TrajectoryDistribution:
    """Episodes of an environment under a policy: ``p(tau) = p(s_0) prod_t policy(a_t | s_t) p(r_t, s_t+1 | s_t, a_t)``.

    The environment's factors do not depend on the policy's parameters, so they vanish from the score, unknown as they
    are (Williams, 1992); only the policy's log-probabilities are kept, one decision a step.

    f maps the ``Trajectories`` to ``[N, T]``, one value per step, charged to the actions up to it (reward-to-go,
    undiscounted), or to ``[N]``, one value of the whole episode, charged to all. Values of absent steps count as 0. The
    observations are the draws' context, so that ``ValueFunction(module)`` reads them, ``[N, T, *obs] -> [N, T, 1]``.

    Args:
        env: any Gymnasium vector environment; see ``rollout``.
        policy: a module that maps observations to a distribution over actions.
        max_steps: an episode that is not over by then counts as truncated; None: as long as it takes.

    Raises:
        ScorefnError: env is not vectorised, or policy is not a module.
    """

    def __init__(self, env: Environment, policy: nn.Module, *, max_steps: int | None = None) -> None:
        check_environment(env)
        check_policy(policy)
        self.env, self.policy, self.max_steps = env, policy, max_steps

    def draws(self, f: Integrand, num_samples: int, *, coupling: Coupling | None = None) -> Draws:
        """Roll out without gradient, call f once, score all present actions at once.

        Args:
            f: ``Trajectories -> [N, T]`` or ``[N]``.
            num_samples: N episodes.
            coupling: none but ``Independent``: an environment draws its own random numbers.

        Raises:
            ShapeError: f returned another shape.
            NonFiniteError: a value or a log-probability is NaN or infinite.
            SupportError: the support of the policy's distribution moves with a parameter that requires grad.
            ScorefnError: a coupling, a policy that does not fit the environment, or one that is not a fixed function.
        """
        if coupling is not None and not isinstance(coupling, Independent):
            raise ScorefnError(
                f"coupling={coupling!r} was given, but an environment draws its own random numbers, which cannot be "
                "coupled: leave coupling out; episodes are independent."
            )
        trajectories = rollout(self.env, self.policy, num_samples, max_steps=self.max_steps)
        log_prob = self._log_prob(trajectories)
        fx, credit = _valued(evaluate(f, trajectories, log_prob), trajectories.mask)
        return Draws(
            trajectories, log_prob, fx, credit=credit, mask=trajectories.mask, context=trajectories.observations
        )

    def _log_prob(self, trajectories: Trajectories) -> Tensor:
        """Log-probability of each action, ``[N, T]``, 0 where absent: one call of the policy, on present steps only."""
        present = trajectories.mask.nonzero(as_tuple=True)
        scored = _scored(self.policy, trajectories.observations[present], trajectories.actions[present])
        log_prob = scored.new_zeros(trajectories.mask.shape).index_put(present, scored)
        _check_same(self.policy, trajectories, log_prob.detach()[:, 0])
        return log_prob


def _scored(policy: nn.Module, observations: Tensor, actions: Tensor) -> Tensor:
    """``[M, *obs], [M, *act] -> [M]``."""
    distribution = action_distribution(policy, observations)
    check_support(distribution)
    log_prob: Tensor = distribution.log_prob(actions)
    if log_prob.shape != observations.shape[:1]:
        raise ShapeError(
            f"The policy's log_prob of {len(observations)} actions has shape {tuple(log_prob.shape)}, but "
            f"{(len(observations),)} is needed, one number per action: declare action dimensions with "
            "torch.distributions.Independent(distribution, 1)."
        )
    return log_prob


@torch.no_grad()
def _check_same(policy: nn.Module, trajectories: Trajectories, scored: Tensor) -> None:
    """Refuse a policy that scores the first actions ``[N]`` differently a second time, in a smaller batch."""
    again = _scored(policy, trajectories.observations[:, 0], trajectories.actions[:, 0])
    tolerance = 10 * torch.finfo(scored.dtype).eps ** 0.5 * (1 + scored.abs())
    differs = (again - scored).abs() > tolerance
    if bool(differs.any()):
        i = int(differs.nonzero()[0])
        raise ScorefnError(
            f"The policy gave one and the same action of episode {i} the log-probability {scored[i].item():.6g} in one "
            f"call and {again[i].item():.6g} in another: the score would not belong to what was sampled. Dropout and "
            "batch normalisation do this in training mode: call policy.eval(), which keeps the gradient."
        )


def _valued(fx: Tensor, mask: Tensor) -> tuple[Tensor, Credit]:
    """f's values as ``[N, J]``, and how they are charged."""
    if fx.shape == mask.shape:
        return torch.where(mask, fx, fx.new_zeros(())), RewardToGo()
    if fx.shape == mask.shape[:1]:
        return fx.unsqueeze(-1), Total()
    raise ShapeError(
        f"f returned shape {tuple(fx.shape)} for episodes of shape [N, T] = {tuple(mask.shape)}: return one value per "
        f"step, {tuple(mask.shape)}, or one per episode, {tuple(mask.shape[:1])}."
    )
