"""One run of policy-gradient training: policy, value function, update, checkpoint; ``train.py`` is its program.

One loop for every environment and method; ``settings.py`` has the rows. What differs between methods is which f is
drawn, how it is charged and which baseline is subtracted (``Method``); ppo_clip takes several steps on each batch.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import gymnasium
import torch
from gymnasium.vector import AutoresetMode, VectorEnv
from torch import Tensor, nn

import scorefn as sf
from applications.checkpoint import read_checkpoint, write_checkpoint
from applications.rl.ranks import Ranks
from applications.rl.settings import WHOLE_EPISODES, Settings

FORMAT = 1  # of a checkpoint


def make_env(settings: Settings, num_envs: int) -> VectorEnv[Any, Any, Any]:
    """The environment in ``num_envs`` streams."""
    if settings.vectorization == "vector_entry_point":
        return gymnasium.make_vec(settings.env, num_envs=num_envs, vectorization_mode=settings.vectorization)
    mode = {"autoreset_mode": AutoresetMode.SAME_STEP}
    return gymnasium.make_vec(
        settings.env, num_envs=num_envs, vectorization_mode=settings.vectorization, vector_kwargs=mode
    )


def network(sizes: tuple[int, ...], scale: float) -> nn.Sequential:
    """A tanh network with orthogonal weights, the last ones of the given scale."""
    layers: list[nn.Module] = []
    for i, (narrow, wide) in enumerate(pairwise(sizes)):
        last = i == len(sizes) - 2
        linear = nn.Linear(narrow, wide)
        nn.init.orthogonal_(linear.weight, scale if last else 2**0.5)
        nn.init.zeros_(linear.bias)
        layers += [linear] if last else [linear, nn.Tanh()]
    return nn.Sequential(*layers)


@dataclass
class Method:
    """What is drawn, how it is charged and what is subtracted."""

    f: Callable[[Any], Tensor]
    credit: Any
    baseline: Any = None


class Training:
    """One run: policy, value function, optimisers, streams and what was seen so far."""

    def __init__(self, settings: Settings, seed: int, ranks: Ranks | None = None) -> None:
        self.settings, self.seed, self.ranks = settings, seed, Ranks() if ranks is None else ranks
        self.num_envs = self.ranks.share(settings.num_envs)
        torch.manual_seed(seed)  # the same networks on every rank
        self.env = make_env(settings, self.num_envs)
        (size,) = self.env.single_observation_space.shape
        self.normalization = sf.trajectories.ObservationNormalization((size,), process_group=self.ranks.group)
        first = [self.normalization] if settings.normalize_observations else []
        self.policy = self._policy(size, first)
        self.value = nn.Sequential(*first, *network((size, *settings.hidden, 1), 1.0))
        self.optimizer = torch.optim.Adam(self.policy.parameters(), lr=settings.learning_rate, eps=1e-5)
        self.value_optimizer = torch.optim.Adam(self.value.parameters(), lr=settings.value_learning_rate, eps=1e-5)
        self.method = self._method()
        self.updates = self.env_steps = 0
        self.cpu_seconds = self.wall_seconds = 0.0
        self.recent: deque[float] = deque(maxlen=100)  # returns of the last episodes
        self.curve: list[tuple[int, float]] = []  # environment steps, mean of the recent returns
        if self.ranks.size > 1:
            torch.manual_seed(self.ranks.seed(seed, 0))
        self.start_streams()

    def _policy(self, size: int, first: list[nn.Module]) -> nn.Module:
        space, settings = self.env.single_action_space, self.settings
        if isinstance(space, gymnasium.spaces.Discrete):
            body = network((size, *settings.hidden, int(space.n)), 0.01)
            return sf.trajectories.CategoricalPolicy(nn.Sequential(*first, *body))
        body = network((size, *settings.hidden, space.shape[0]), 0.01)
        log_scale = torch.full(space.shape, settings.log_scale)
        bounds = sf.trajectories.Clip.from_space(space)
        return sf.trajectories.GaussianPolicy(nn.Sequential(*first, *body), log_scale, bounds=bounds)

    def _method(self) -> Method:
        discount, name = self.settings.discount, self.settings.method
        to_go = sf.RewardToGo(discount, visitation_discount=False)
        if name == "reinforce":
            return Method(self._discounted, sf.Total())
        if name in ("reward_to_go", "rloo"):
            return Method(self._rewards, to_go, sf.LeaveOneOut(self.ranks.group) if name == "rloo" else None)
        if name == "value_baseline":
            return Method(self._rewards, to_go, sf.ValueFunction(self.value))
        errors = sf.trajectories.TemporalDifference(self.value, discount)
        return Method(
            lambda tau: errors(tau._replace(rewards=self._rewards(tau))),
            sf.RewardToGo(discount * self.settings.lambda_, visitation_discount=False),
        )

    def _rewards(self, tau: sf.trajectories.Trajectories) -> Tensor:
        return self.settings.reward_scale * tau.rewards

    def _discounted(self, tau: sf.trajectories.Trajectories) -> Tensor:
        steps = torch.arange(tau.rewards.shape[1])
        return (self._rewards(tau) * self.settings.discount**steps).sum(-1)

    def start_streams(self) -> None:
        """From fresh resets, seeded by torch's generator: all that a checkpoint need not hold."""
        whole = self.settings.method in WHOLE_EPISODES
        self.measure = (
            sf.trajectories.TrajectoryDistribution(self.env, self.policy)
            if whole
            else sf.trajectories.SegmentDistribution(self.env, self.policy, self.settings.steps)
        )
        self.earned = torch.zeros(self.num_envs)  # so far, by the episodes that the streams are in

    @property
    def finished(self) -> bool:
        """Whether all steps are done, or the recent returns are good enough."""
        settings = self.settings
        solved = settings.solved is not None and bool(self.curve) and self.curve[-1][1] >= settings.solved
        return self.env_steps >= settings.total_steps or solved

    def update(self) -> dict[str, float]:
        """Draw, step the policy, then fit the value function and the normaliser; what there is to report."""
        wall, cpu = time.perf_counter(), time.process_time()
        meters = self.learn(sf.draw(self.measure, self.method.f, self.num_envs))
        self.cpu_seconds += float(self.ranks.add(torch.tensor(time.process_time() - cpu, dtype=torch.float64)))
        self.wall_seconds += time.perf_counter() - wall
        if self.updates % self.settings.checkpoint_every == 0:
            self.start_streams()
        return meters

    def learn(self, draws: sf.Draws) -> dict[str, float]:
        """An update from draws that are given, this rank's part of the batch; what there is to report."""
        draws = draws.bound(self.method.credit)
        signal = draws.signal()
        baseline = 0.0 if self.method.baseline is None else self.method.baseline(signal, draws)
        present = torch.ones_like(signal, dtype=torch.bool) if draws.mask is None else draws.mask
        advantage = torch.where(present, signal - baseline, 0.0)
        self._set_learning_rate()
        metered = self.updates % self.settings.meters_every == 0 and len(draws) > 1
        mean, scale = self.ranks.mean_and_std(advantage[present])
        meters = {"advantage scale": float(scale)}
        if metered:
            surrogate = sf.surrogate(draws, baseline=sf.Constant(signal - advantage))
            meters |= sf.trajectories.read_meters(surrogate, list(self.policy.parameters()), draws)
        if self.settings.method == "ppo_clip":
            self._clipped_steps(draws.x, draws.log_prob.detach(), (advantage - mean) / scale.clamp(min=1e-8))
        else:
            self._score_step(draws, signal - advantage, mean, scale)
        if metered:
            meters["KL to the previous policy"] = sf.trajectories.policy_change(draws, self._scored(draws.x)).kl
        if self._has_value:
            meters |= self._fit_value(draws.x, signal)
        self.normalization.update(draws.x.observations, draws.mask)
        self.updates += 1
        self.env_steps += int(self.ranks.add(present.sum()))
        self._note_returns(draws.x)
        return meters

    @property
    def _has_value(self) -> bool:
        return self.settings.method in ("value_baseline", "gae", "ppo_clip")

    def _set_learning_rate(self) -> None:
        left = max(1.0 - self.env_steps / self.settings.total_steps, self.settings.decay_to)
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.learning_rate * left

    def _score_step(self, draws: sf.Draws, baseline: Tensor, mean: Tensor, scale: Tensor) -> None:
        """One step along the score-function estimate; by the whole batch's mean and scale of the advantages as well."""
        if self.settings.standardize_advantages:
            baseline, scale = baseline + mean, scale.clamp(min=1e-8)
        else:
            scale = torch.ones(())
        surrogate = sf.surrogate(draws, baseline=sf.Constant(baseline)).mean() / scale
        self._descend(self.optimizer, -surrogate)

    @torch.no_grad()
    def _scored(self, tau: sf.trajectories.Trajectories) -> Tensor:
        """Log-probabilities ``[N, T]`` under the present policy."""
        scored = self.policy(tau.observations[tau.mask]).log_prob(tau.actions[tau.mask])
        return torch.zeros_like(tau.rewards).masked_scatter(tau.mask, scored)

    def _clipped_steps(self, tau: sf.trajectories.Trajectories, log_prob: Tensor, advantage: Tensor) -> None:
        """Several epochs over the steps of a batch, each with the ratio to the policy that drew it, clipped."""
        present = tau.mask
        observations, actions = tau.observations[present], tau.actions[present]
        behaviour, advantage = log_prob[present], advantage[present]
        clip = sf.trajectories.Clipped(self.settings.clip)
        for index, number in self._minibatches(len(actions), self.settings.epochs):
            if len(index) == 0:  # all of the minibatch lies on other ranks
                self._descend(self.optimizer, None)
                continue
            scored = self.policy(observations[index]).log_prob(actions[index]).unsqueeze(-1)
            charged = advantage[index].unsqueeze(-1)
            steps = sf.Draws(actions[index], scored, charged, behaviour_log_prob=behaviour[index].unsqueeze(-1))
            surrogate = sf.trajectories.ratio_surrogate(steps, charged, transform=clip)
            self._descend(self.optimizer, -surrogate.sum() / number)

    def _fit_value(self, tau: sf.trajectories.Trajectories, signal: Tensor) -> dict[str, float]:
        """Least squares on what the steps earned, after the advantages were taken; how good it was and is."""
        observations, target = tau.observations[tau.mask], signal[tau.mask]
        with torch.no_grad():
            value = self.value(observations).squeeze(-1)
        if self.settings.method != "value_baseline":  # the signal is an advantage over the value function
            target = target + value
        whole = [(torch.arange(len(target)), self.ranks.denominator(len(target)))] * self.settings.value_steps
        clipped = self.settings.method == "ppo_clip"
        loss = torch.zeros(())
        for index, number in self._minibatches(len(target), self.settings.epochs) if clipped else whole:
            loss = (self.value(observations[index]).squeeze(-1) - target[index]).square().sum() / number
            self._descend(self.value_optimizer, loss)
        loss = self.ranks.add(loss.detach()) / self.ranks.size
        return {"value loss": loss.item(), "value R2": sf.trajectories.explained_variance(target, value)}

    def _minibatches(self, count: int, epochs: int) -> list[tuple[Tensor, float]]:
        """Which of this rank's steps are in each minibatch of the whole batch, and what their sum is divided by."""
        ranks, size = self.ranks, self.settings.minibatch
        counts = ranks.join(torch.tensor([count])).tolist()
        first = sum(counts[: ranks.rank])
        orders = [ranks.of_first(torch.randperm(sum(counts))) for _ in range(epochs)]
        parts = [part for order in orders for part in order.split(size)]
        return [(part[(part >= first) & (part < first + count)] - first, len(part) / ranks.size) for part in parts]

    def _descend(self, optimizer: torch.optim.Optimizer, loss: Tensor | None) -> None:
        """One step along the mean of the ranks' gradients."""
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        optimizer.zero_grad()
        if loss is not None:
            loss.backward()
        self.ranks.average(parameters)
        if self.settings.gradient_norm is not None:
            nn.utils.clip_grad_norm_(parameters, self.settings.gradient_norm)
        optimizer.step()

    def _note_returns(self, tau: sf.trajectories.Trajectories) -> None:
        """The returns of the episodes that ended in these streams."""
        rewards = tau.rewards.clone()
        rewards[:, 0] += torch.where(tau.starts[:, 0], 0.0, self.earned)
        running = sf.linear_recurrence(rewards, (~tau.starts).to(rewards), dim=1)
        self.recent.extend(self.ranks.join(running[tau.done]).tolist())
        self.earned = torch.where(tau.done[:, -1], 0.0, running[:, -1])
        if self.recent:
            self.curve.append((self.env_steps, sum(self.recent) / len(self.recent)))

    def save(self, path: Path) -> None:
        """Write all that the rest of the run depends on, in one piece or not at all; rank 0 does, for all."""
        generators = self.ranks.join(torch.get_rng_state().unsqueeze(0))
        if self.ranks.rank > 0:
            return
        state = {name: getattr(self, name) for name in _PLAIN} | {
            "format": FORMAT,
            "settings": self.settings.state(),
            "recent": list(self.recent),
            **{name: getattr(self, name).state_dict() for name in _WITH_STATE},
        }
        if self.ranks.size > 1:
            state["generators"] = generators
        write_checkpoint(path, state)

    @classmethod
    def load(cls, path: Path, settings: Settings | None = None, ranks: Ranks | None = None) -> Training:
        """Go on from a checkpoint: bit for bit with as many ranks as wrote it, with fresh seeds with another number.

        Raises:
            sf.ScorefnError: no such file, a checkpoint of another format, or of other settings than the given ones.
        """
        names = [*_PLAIN, *_WITH_STATE, "format", "settings", "recent"]
        training, generators = read_checkpoint(path, names, lambda state: cls._of(state, path, settings, ranks))
        ranks = training.ranks
        if len(generators) != ranks.size:
            torch.manual_seed(ranks.seed(training.seed, training.updates))
        elif ranks.size > 1:
            torch.set_rng_state(generators[ranks.rank].clone())  # torch reads from where the storage begins
        return training

    @classmethod
    def _of(
        cls, state: dict[str, Any], path: Path, settings: Settings | None, ranks: Ranks | None
    ) -> tuple[Training, Tensor]:
        """The run, and the states of the generators of the ranks that wrote it."""
        known = state["format"]
        if known != FORMAT or set(state["settings"]) != set(Settings.__dataclass_fields__):
            raise sf.ScorefnError(
                f"{path} has format {known!r} with {len(state['settings'])} settings, but this program reads format "
                f"{FORMAT} with {len(Settings.__dataclass_fields__)}: it was written by another version. Begin the run "
                "anew in another folder."
            )
        found = Settings(**(state["settings"] | {"hidden": tuple(state["settings"]["hidden"])}))
        if settings is not None and found != settings:
            differs = [name for name, value in settings.state().items() if getattr(found, name) != value]
            raise sf.ScorefnError(
                f"{path} is of a run of {found.env} by {found.method}, which differs from what is asked for in "
                f"{', '.join(differs)}: resume it with the settings it was begun with, or choose another folder."
            )
        training = cls(found, state["seed"], ranks)
        for name in _WITH_STATE:
            getattr(training, name).load_state_dict(state[name])
        for name in _PLAIN:
            setattr(training, name, state[name])
        training.curve = [tuple(point) for point in state["curve"]]
        training.recent.extend(state["recent"])
        return training, state.get("generators", state["generator"].unsqueeze(0))


_PLAIN = ["seed", "updates", "env_steps", "cpu_seconds", "wall_seconds", "curve"]
_WITH_STATE = ["policy", "value", "normalization", "optimizer", "value_optimizer"]
