"""CartPole-v1: trainings of ``applications/benchmarks/rl_peers``, in environment steps per CPU second."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np

from applications.benchmarks.rl_peers.watch import STREAMS, Watch, native
from applications.benchmarks.side_by_side.work import Answer, Sample, Work, digest, exactly

FIRST_SEED = 400


def throughput(who: str, max_steps: int, **options: Any) -> Work:
    """Collection and update until so many environment steps are learnt from; the time of building is not counted."""
    train = _training(who)

    def run(turn: int) -> Sample:
        watch = Watch(max_steps=max_steps)
        train(watch, FIRST_SEED + turn, **options)
        return {"cpu": watch.cpu, "work": float(watch.env_steps)}

    return Work(run, (lambda: _gradient(who, options)) if who in ("scorefn", "loop") else None)


def threshold(who: str, max_steps: int, **options: Any) -> Work:
    """CPU seconds and steps until 100 sampled episodes average 475, confirmed by 100 more; see ``Watch``."""
    train = _training(who)

    def run(turn: int) -> Sample:
        watch = Watch(seed=FIRST_SEED + turn, judged=True, max_steps=max_steps)
        train(watch, FIRST_SEED + turn, **options)
        return {"cpu": watch.cpu, "work": float(watch.env_steps), "value": 1.0 if watch.solved else None}

    return Work(run)


def _training(who: str) -> Callable[..., None]:
    """Imported where it is asked for: the peers' environments need not have what scorefn's programs need."""
    if who in ("scorefn", "loop", "few steps"):
        from applications.benchmarks.rl_peers import learners

        kinds = {
            "scorefn": learners.train_scorefn,
            "loop": learners.train_by_hand,
            "few steps": learners.train_few_steps,
        }
        return kinds[who]
    from applications.benchmarks.rl_peers import libraries

    found: Callable[..., None] = getattr(libraries, f"train_{who}")
    return found


def _gradient(who: str, options: dict[str, Any]) -> Answer:
    """Of the first update, in four sums."""
    import torch

    from applications.benchmarks.rl_peers.learners import ByHand, Ours

    torch.manual_seed(0)
    learner = (Ours if who == "scorefn" else ByHand)(**options)
    learner.update()
    gradient = torch.cat([q.grad.flatten() for q in learner.parameters if q.grad is not None])
    return exactly(digest(gradient))


def stepping(max_steps: int, policy: bool = False) -> Work:
    """Nothing but the environment: random actions, or those of a policy network that does not learn."""
    import torch

    from applications.benchmarks.rl_peers.watch import HIDDEN, race, tanh_network

    network = tanh_network(HIDDEN)

    def run(turn: int) -> Sample:
        env = native(STREAMS)
        observation, _ = env.reset(seed=FIRST_SEED + turn)
        draws, rows = np.random.default_rng(turn), -(-max_steps // STREAMS)
        actions = draws.integers(0, 2, (rows, STREAMS))
        begin = time.process_time()
        with torch.no_grad():
            for row in range(rows):
                action = race(network(torch.from_numpy(observation))).numpy() if policy else actions[row]
                observation, *_ = env.step(action)
        return {"cpu": time.process_time() - begin, "work": float(rows * STREAMS)}

    return Work(run)
