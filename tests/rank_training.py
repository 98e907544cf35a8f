"""What each of two gloo processes trains for its tests: ``python -m tests.rank_training RANK FOLDER``."""

from __future__ import annotations

import sys
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import scorefn as sf
from applications.rl.ranks import Ranks
from applications.rl.settings import METHODS, WHOLE_EPISODES, Settings
from applications.rl.train import train
from applications.rl.training import Training

SMALL = Settings(
    "CartPole-v1",
    "gae",
    total_steps=100_000,
    num_envs=6,
    steps=20,
    vectorization="vector_entry_point",
    hidden=(8,),
    value_steps=2,
    epochs=2,
    minibatch=32,
    gradient_norm=0.5,
    decay_to=1.0,
    checkpoint_every=2,
)


def updated(method: str, ranks: Ranks) -> dict[str, torch.Tensor]:
    """Three updates from draws that one environment made of all streams; each rank learns from its part."""
    torch.manual_seed(1)
    settings = replace(SMALL, method=method)
    training = Training(settings, 0, ranks)
    env = Training(settings, 0).env  # of all streams
    torch.manual_seed(2)
    kind = sf.trajectories.TrajectoryDistribution
    whole = method in WHOLE_EPISODES
    measure = kind(env, training.policy) if whole else sf.trajectories.SegmentDistribution(env, training.policy, 20)
    first = ranks.rank * training.num_envs
    for _ in range(3):
        draws = sf.draw(measure, training.method.f, settings.num_envs)
        meters = training.learn(draws[first : first + training.num_envs])
    return state(training) | {
        "advantage scale": torch.tensor(meters["advantage scale"]),
        "value loss": torch.tensor(meters.get("value loss", 0.0)),
        "recent": torch.tensor(list(training.recent)),
    }


def state(training: Training) -> dict[str, torch.Tensor]:
    parts = {name: getattr(training, name).state_dict() for name in ("policy", "value", "normalization")}
    named = {f"{name}.{key}": value for name, part in parts.items() for key, value in part.items()}
    return {key: value.clone() for key, value in named.items()} | {"curve": torch.tensor(training.curve)}


def resumed(rank: int, folder: Path) -> dict[str, Any]:
    """A run that is cut and resumed by two ranks, and the same run in one piece."""
    settings = replace(SMALL, method="ppo_clip", total_steps=SMALL.num_envs * SMALL.steps * 5)
    ranks = Ranks(rank, 2)
    pieces = Training(settings, 3, ranks)
    train(pieces, folder / "pieces", should_stop=lambda: rank == 1 and pieces.updates == 3)  # one rank's Ctrl-C
    torch.manual_seed(99)  # what happens in between does not matter
    again = Training.load(folder / "pieces" / "checkpoint.pt", settings, ranks)
    begun = (pieces.updates, again.updates)
    train(again, folder / "pieces")
    whole = Training(settings, 3, ranks)
    train(whole, folder / "whole")
    same = all(torch.equal(value, state(whole)[name]) for name, value in state(again).items())
    return {"begun": begun, "same": same, "updates": (again.updates, whole.updates), "state": state(whole)}


def main(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=60))
    found: dict[str, Any] = {method: updated(method, Ranks(rank, 2)) for method in METHODS}
    found["resumed"] = resumed(rank, folder)
    try:
        Ranks(rank, 2).check_same(f"seed {rank}")
    except sf.ScorefnError as error:
        found["different"] = str(error)
    try:
        Training.load(folder / "whole" / "checkpoint.pt", SMALL, Ranks(rank, 2))
    except sf.ScorefnError as error:
        found["stale"] = str(error)
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
