"""What the training program does for each environment and method: one typed table."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

from scorefn import ScorefnError

METHODS = ("reinforce", "reward_to_go", "rloo", "value_baseline", "gae", "ppo_clip")
WHOLE_EPISODES = ("reinforce", "reward_to_go", "rloo", "value_baseline")  # the others learn from segments


@dataclass(frozen=True)
class Settings:
    """What a run depends on, apart from its seed.

    A segment is ``steps`` steps of each of ``num_envs`` streams; methods on whole episodes take ``num_envs`` episodes.
    """

    env: str
    method: str
    total_steps: int  # of the environment; training ends with the update that reaches them
    num_envs: int = 8
    steps: int = 250
    vectorization: str = "sync"  # "vector_entry_point" where the environment has one NumPy program for all streams
    hidden: tuple[int, ...] = (64, 64)  # of the policy's and of the value function's network, tanh
    learning_rate: float = 0.01
    decay_to: float = 0.0  # the learning rate falls linearly to this share of itself
    value_learning_rate: float = 0.01
    value_steps: int = 10  # of the value function's optimiser, after each update of the policy
    discount: float = 0.99
    lambda_: float = 0.95
    log_scale: float = -0.5  # of a Gaussian policy, at the start
    normalize_observations: bool = True  # by the statistics of past batches
    standardize_advantages: bool = True  # by mean and standard deviation of their own batch
    reward_scale: float = 1.0  # of what is learned from; returns are reported unscaled
    epochs: int = 10  # of ppo_clip
    minibatch: int = 256
    clip: float = 0.2
    gradient_norm: float | None = None  # at most
    checkpoint_every: int = 25  # updates; the streams start anew there, so that a resumed run is the same run
    meters_every: int = 10  # updates; gradient noise, entropy, KL to the previous policy
    solved: float | None = None  # stop when the last 100 episodes average this

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        return asdict(self)


_CARTPOLE = Settings(
    "CartPole-v1",
    "rloo",
    total_steps=400_000,
    num_envs=64,
    vectorization="vector_entry_point",
    hidden=(32,),
    learning_rate=0.03,
    decay_to=1.0,
    normalize_observations=False,
    standardize_advantages=False,
    discount=1.0,
    solved=490.0,
)
_ACROBOT = Settings(
    "Acrobot-v1",
    "gae",
    total_steps=240_000,
    num_envs=16,
    steps=62,
    learning_rate=0.005,
    lambda_=0.97,
    decay_to=0.1,
    reward_scale=0.05,
)
_PENDULUM = Settings(
    "InvertedPendulum-v5",
    "gae",
    total_steps=200_000,
    value_steps=20,
    lambda_=0.97,
    log_scale=-1.0,
    reward_scale=0.05,
)
_LANDER = Settings(
    "LunarLander-v3",
    "gae",
    total_steps=600_000,
    hidden=(128, 128),
    learning_rate=0.004,
    value_learning_rate=0.004,
    value_steps=30,
    lambda_=0.98,
    normalize_observations=False,
    reward_scale=0.02,
)
_CHEETAH = Settings("HalfCheetah-v5", "gae", total_steps=500_000, steps=625, discount=0.95)
_HOPPER = Settings("Hopper-v5", "gae", total_steps=1_000_000, steps=500, learning_rate=0.005, value_learning_rate=0.005)
_BY_ENV = {s.env: s for s in (_CARTPOLE, _ACROBOT, _PENDULUM, _LANDER, _CHEETAH, _HOPPER)}
_PPO: dict[str, Any] = {
    "method": "ppo_clip",
    "steps": 256,
    "learning_rate": 5e-4,
    "value_learning_rate": 5e-4,
    "gradient_norm": 0.5,
    "reward_scale": 0.01,
    "normalize_observations": True,
    "standardize_advantages": True,
    "discount": 0.99,
    "lambda_": 0.95,
    "solved": None,
}
_CHANGED: dict[tuple[str, str], dict[str, Any]] = {
    ("CartPole-v1", "gae"): {  # few environment steps
        "num_envs": 8,
        "steps": 64,
        "value_learning_rate": 0.03,
        "value_steps": 20,
        "discount": 0.99,
        "reward_scale": 0.05,
    },
    ("CartPole-v1", "ppo_clip"): {"num_envs": 8, "hidden": (64, 64), "learning_rate": 1e-3},
}


def settings_for(env: str, method: str | None = None) -> Settings:
    """The row of an environment, for its own method or another one.

    Raises:
        ScorefnError: no row for the environment.
    """
    if env not in _BY_ENV:
        raise ScorefnError(
            f"There are no settings for {env!r}, only for {', '.join(_BY_ENV)}: add a row to settings.py."
        )
    row = _BY_ENV[env]
    if method is None or method == row.method:
        return row
    changed = (_PPO if method == "ppo_clip" else {"method": method}) | _CHANGED.get((env, method), {})
    return replace(row, **changed)
