"""CartPole-v1: environment steps that are learnt from in a CPU second, and CPU seconds until the policy is good."""

from __future__ import annotations

from typing import Any

from applications.benchmarks.side_by_side.measures import RATE, SECONDS_UNTIL, WORK_UNTIL
from applications.benchmarks.side_by_side.row import Contender, Row, Suite

CARTPOLE = "applications.benchmarks.contenders.cartpole"
LEARNT = 150_000  # environment steps of a turn; a peer's updates are many times dearer
PEERS_LEARN = 12_000
SB3: dict[str, Any] = {"environment": "sb3", "package": "stable-baselines3"}
TIANSHOU: dict[str, Any] = {"environment": "tianshou", "package": "tianshou"}
TORCHRL: dict[str, Any] = {"environment": "torchrl", "package": "torchrl"}


def own(who: str, name: str, role: Any, **options: Any) -> Contender:
    return Contender(name, f"{CARTPOLE}:throughput", {"who": who, "max_steps": LEARNT, **options}, role)


def peer(who: str, name: str, environment: dict[str, Any], **options: Any) -> Contender:
    return Contender(name, f"{CARTPOLE}:throughput", {"who": who, "max_steps": PEERS_LEARN, **options}, **environment)


PEERS = (
    peer("sb3", "SB3 A2C, 8 streams of its zoo", SB3, algorithm="A2C", num_envs=8),
    peer("sb3", "SB3 A2C, 64 streams", SB3, algorithm="A2C", num_envs=64),
    peer("sb3", "SB3 PPO, 8 streams of its zoo", SB3, algorithm="PPO", num_envs=8),
    peer("tianshou", "Tianshou Reinforce, 8 streams", TIANSHOU),
    peer("torchrl", "TorchRL ReinforceLoss + GAE, 64 streams", TORCHRL),
)
LIMITS = (
    Contender("bare stepping, random actions", f"{CARTPOLE}:stepping", {"max_steps": LEARNT}, "limit"),
    Contender("stepping with the policy", f"{CARTPOLE}:stepping", {"max_steps": LEARNT, "policy": True}, "limit"),
)
ABOUT = (
    "REINFORCE with reward-to-go and leave-one-out on 64 native streams, two layers of 64 tanh units, one step of Adam "
    "a batch. The loop draws the same random numbers, and the gradients of the first update are compared. The peers "
    "use their own environments and published settings; they update more often or fit a critic as well, so that their "
    "ratios are of whole libraries, not of one estimator."
)


def throughput(name: str, title: str, steps: int | None) -> Row:
    options = {} if steps is None else {"steps": steps}
    return Row(
        name,
        title,
        ABOUT,
        (
            own("scorefn", "scorefn", "scorefn", **options),
            own("loop", "loop by hand", "by hand", **options),
            *LIMITS,
            *PEERS,
        ),
        (RATE,),
        turns=7,
        quick_turns=3,
        quick_options={"max_steps": 4000},
        shortest=0.0,
    )


def until(who: str, name: str, max_steps: int, role: Any = "peer", **more: Any) -> Contender:
    environment = {key: more.pop(key) for key in ("environment", "package") if key in more}
    options = {"who": who, "max_steps": max_steps, **more}
    return Contender(name, f"{CARTPOLE}:threshold", options, role, **environment)


THRESHOLD = Row(
    "cartpole-threshold",
    "CartPole until 100 sampled episodes average 475",
    "Looked at whenever 1,000 environment steps have passed, outside the clock, and confirmed by 100 further episodes. "
    "A turn is a seed; one that never arrives counts as infinity in the median. Everybody with settings meant for the "
    "task, stopped where their schedules end: 600,000 and 100,000 steps for scorefn's two, 100,000 for PPO, 500,000 "
    "for A2C, 200,000 for Tianshou.",
    (
        until("scorefn", "scorefn, 64 whole episodes", 600_000, "scorefn", hidden=[32], learning_rate=0.03),
        until("loop", "loop by hand, the same", 600_000, "by hand", hidden=[32], learning_rate=0.03),
        until("few steps", "scorefn, fewest steps: GAE, 8 x 64", 100_000, "scorefn"),
        until("sb3", "SB3 PPO, zoo", 100_000, algorithm="PPO", **SB3),
        until("sb3", "SB3 A2C, zoo", 500_000, algorithm="A2C", **SB3),
        until("tianshou", "Tianshou Reinforce, its example", 200_000, **TIANSHOU),
    ),
    (SECONDS_UNTIL, WORK_UNTIL),
    turns=5,
    warm=False,
    quick_turns=1,
    quick_options={"max_steps": 4000},
    shortest=0.0,
)

RL = Suite(
    "rl",
    "Reinforcement learning",
    "CartPole-v1: how many environment steps a second of CPU time learns from, and how long it takes until the policy "
    "is good.",
    (
        throughput("cartpole-episodes", "Learnt throughput, whole episodes", None),
        throughput("cartpole-segments", "Learnt throughput, segments of 128 steps", 128),
        THRESHOLD,
    ),
)
