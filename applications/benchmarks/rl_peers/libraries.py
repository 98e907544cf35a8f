"""The trainings of the peers; each is imported only where it is asked for."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
import torch
from torch import nn

from applications.benchmarks.rl_peers.watch import HIDDEN, STREAMS, Watch, race, tanh_network

PACKAGES = {"sb3": "stable-baselines3", "tianshou": "tianshou", "torchrl": "torchrl"}
MODULES = {"sb3": "stable_baselines3", "tianshou": "tianshou", "torchrl": "torchrl"}


def train_sb3(watch: Watch, seed: int, algorithm: str, num_envs: int = 8) -> None:
    """A2C or PPO with the hyperparameters of RL Baselines3 Zoo for CartPole-v1, and its way to make environments."""
    from stable_baselines3 import A2C, PPO  # type: ignore[import-not-found]
    from stable_baselines3.common.callbacks import BaseCallback  # type: ignore[import-not-found]
    from stable_baselines3.common.env_util import make_vec_env  # type: ignore[import-not-found]

    env = make_vec_env("CartPole-v1", n_envs=num_envs, seed=seed)
    common: dict[str, Any] = {"ent_coef": 0.0, "seed": seed, "device": "cpu"}
    if algorithm == "A2C":
        model, total = A2C("MlpPolicy", env, **common), 500_000
    else:
        model, total = (
            PPO(
                "MlpPolicy",
                env,
                n_steps=32,
                batch_size=256,
                n_epochs=20,
                gamma=0.98,
                gae_lambda=0.8,
                learning_rate=lambda left: 1e-3 * left,
                clip_range=lambda left: 0.2 * left,
                **common,
            ),
            100_000,
        )

    class Looks(BaseCallback):  # type: ignore[misc]
        """The last update is complete when the next rollout begins."""

        stopped = False

        def _on_rollout_start(self) -> None:
            if self.num_timesteps:
                act = lambda seen: model.policy.get_distribution(seen).sample()  # noqa: E731
                self.stopped = watch.after(self.num_timesteps, act)

        def _on_step(self) -> bool:
            return not self.stopped

    watch.start()
    model.learn(total, callback=Looks())


def train_tianshou(
    watch: Watch, seed: int, num_envs: int = 8, activation: type[nn.Module] = nn.ReLU, room: int = 20_000
) -> None:
    """Reinforce with the settings of Tianshou's own CartPole example; as many episodes an update as environments."""
    from tianshou.algorithm import Reinforce  # type: ignore[import-not-found]
    from tianshou.algorithm.modelfree.reinforce import DiscreteActorPolicy  # type: ignore[import-not-found]
    from tianshou.algorithm.optim import AdamOptimizerFactory  # type: ignore[import-not-found]
    from tianshou.data import Collector, VectorReplayBuffer  # type: ignore[import-not-found]
    from tianshou.env import DummyVectorEnv  # type: ignore[import-not-found]
    from tianshou.utils.net.common import Net  # type: ignore[import-not-found]
    from tianshou.utils.torch_utils import policy_within_training_step  # type: ignore[import-not-found]

    np.random.seed(seed)
    torch.manual_seed(seed)
    envs = DummyVectorEnv([lambda: gymnasium.make("CartPole-v1") for _ in range(num_envs)])
    envs.seed(seed)
    network = Net(state_shape=(4,), action_shape=2, hidden_sizes=(64, 64), activation=activation)
    for module in network.modules():
        if isinstance(module, nn.Linear):
            nn.init.orthogonal_(module.weight, 2**0.5)
            nn.init.zeros_(module.bias)
    space = gymnasium.spaces.Discrete(2)
    policy = DiscreteActorPolicy(actor=network, action_space=space)
    optimizer = AdamOptimizerFactory(lr=1e-3)
    algorithm = Reinforce(policy=policy, gamma=0.95, return_standardization=True, optim=optimizer)
    collector = Collector(policy, envs, VectorReplayBuffer(room, num_envs))
    watch.start()
    collector.reset()
    env_steps = 0
    while True:
        with policy_within_training_step(policy):
            env_steps += collector.collect(n_episode=num_envs).n_collected_steps
            algorithm.update(collector.buffer, batch_size=64, repeat=2)
            collector.reset_buffer(keep_statistics=True)
        if watch.after(env_steps, lambda seen: race(network(seen)[0])):
            return


def train_torchrl(watch: Watch, seed: int, num_envs: int = STREAMS, steps: int = 64) -> None:
    """ReinforceLoss with a critic and GAE on segments, one step of Adam each."""
    from tensordict.nn import TensorDictModule  # type: ignore[import-not-found]
    from torchrl.collectors import Collector  # type: ignore[import-not-found]
    from torchrl.envs import GymWrapper  # type: ignore[import-not-found]
    from torchrl.modules import ProbabilisticActor, ValueOperator  # type: ignore[import-not-found]
    from torchrl.objectives import ReinforceLoss  # type: ignore[import-not-found]
    from torchrl.objectives.value import GAE  # type: ignore[import-not-found]

    torch.manual_seed(seed)
    mode = {"autoreset_mode": gymnasium.vector.AutoresetMode.DISABLED}
    # a vector environment in one wrapper: five times as fast as SerialEnv of 64 wrappers
    vector = gymnasium.make_vec("CartPole-v1", num_envs=num_envs, vectorization_mode="sync", vector_kwargs=mode)
    env = GymWrapper(vector, categorical_action_encoding=True)
    env.set_seed(seed)
    network = tanh_network(HIDDEN)
    actor = ProbabilisticActor(
        TensorDictModule(network, in_keys=["observation"], out_keys=["logits"]),
        in_keys=["logits"],
        distribution_class=torch.distributions.Categorical,
        return_log_prob=True,
    )
    critic = ValueOperator(tanh_network(HIDDEN, 1), in_keys=["observation"])
    advantage, loss = GAE(gamma=0.99, lmbda=0.95, value_network=critic), ReinforceLoss(actor, critic)
    optimizer = torch.optim.Adam(loss.parameters(), lr=0.01)
    env_steps = 0
    watch.start()
    for data in Collector(env, actor, frames_per_batch=num_envs * steps, total_frames=-1):
        with torch.no_grad():
            advantage(data)
        losses = loss(data)
        optimizer.zero_grad()
        (losses["loss_actor"] + losses["loss_value"]).backward()
        optimizer.step()
        env_steps += data.numel()
        if watch.after(env_steps, lambda seen: race(network(seen))):
            return
