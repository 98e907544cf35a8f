"""CartPole-v1 by the score function alone: ``python -m applications.rl.cartpole --seeds 10 --out runs/cartpole``.

REINFORCE in five lines: draw whole episodes, charge each action with the rewards after it, subtract the mean of the
other episodes at the same step, take a step of Adam. A seed is solved when the mean return of a batch reaches the
threshold and 100 fresh sampled episodes confirm it; another 100, which decide nothing, are what is reported.

Ctrl-C stops at the next update and writes a checkpoint; ``--resume FILE`` goes on from it, bit for bit.
"""

from __future__ import annotations

import argparse
import csv
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import gymnasium
import torch
from torch import Tensor, nn

import scorefn as sf
from applications.checkpoint import read_checkpoint, write_checkpoint
from applications.progress import Interruption


@dataclass(frozen=True)
class Config:
    """What a run depends on, apart from its seed."""

    num_samples: int = 64  # episodes per update, one per stream
    hidden: int = 32
    learning_rate: float = 0.03
    threshold: float = 475.0  # mean return at which Gymnasium calls the task solved
    stop_at: float = 490.0  # mean return of 100 fresh episodes at which training stops: a margin over the threshold
    episodes: int = 100  # of each evaluation
    max_updates: int = 200


@dataclass
class Run:
    """One seed: the trained policy and how it came about."""

    seed: int
    config: Config
    policy: sf.trajectories.CategoricalPolicy
    optimizer: torch.optim.Adam
    updates: int = 0
    env_steps: int = 0  # steps of episodes; what the other streams do after their end is not counted
    train_seconds: float = 0.0  # CPU seconds of rollouts, scores, gradients and updates
    evaluation_seconds: float = 0.0  # CPU seconds of the stopping rule's evaluations
    returns: list[float] = field(default_factory=list)  # mean return of each batch
    evaluated: list[float] = field(default_factory=list)  # mean return of each of the stopping rule's evaluations
    solved: bool = False


def make_env(num_envs: int) -> gymnasium.vector.VectorEnv:
    """CartPole-v1 as one NumPy program for all streams."""
    return gymnasium.make_vec("CartPole-v1", num_envs=num_envs, vectorization_mode="vector_entry_point")


def new_run(seed: int, config: Config) -> Run:
    """A fresh policy, drawn from torch's global generator."""
    network = nn.Sequential(nn.Linear(4, config.hidden), nn.Tanh(), nn.Linear(config.hidden, 2))
    policy = sf.trajectories.CategoricalPolicy(network)
    return Run(seed, config, policy, torch.optim.Adam(policy.parameters(), lr=config.learning_rate))


def train(
    seed: int,
    config: Config = Config(),
    *,
    progress: Callable[[Run], None] | None = None,
    should_stop: Callable[[], bool] = lambda: False,
    checkpoint: Path | None = None,
    resume: Path | None = None,
) -> Run:
    """Train one seed until it is solved; torch's global generator is left as it was.

    Args:
        seed: decides everything.
        config: see ``Config``.
        progress: called with the run after every update.
        should_stop: asked after every update.
        checkpoint: where the state is written, when ``should_stop`` says yes.
        resume: a checkpoint to go on from; its seed and config are used.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        run = new_run(seed, config) if resume is None else load(resume)
        config = run.config
        tau = sf.trajectories.TrajectoryDistribution(make_env(config.num_samples), run.policy)
        while not run.solved and run.updates < config.max_updates:
            start = time.process_time()
            draws = sf.draw(tau, sf.trajectories.rewards, config.num_samples)
            surrogate = sf.surrogate(draws, baseline=sf.LeaveOneOut()).mean()  # its value is the mean return
            run.optimizer.zero_grad()
            (-surrogate).backward()
            run.optimizer.step()
            run.updates += 1
            run.env_steps += int(draws.mask.sum())
            run.returns.append(surrogate.item())
            run.train_seconds += time.process_time() - start
            run.solved = run.returns[-1] >= config.threshold and _confirms(run)
            if progress is not None:
                progress(run)
            if should_stop():
                if checkpoint is not None:
                    save(run, checkpoint)
                break
    return run


def _confirms(run: Run) -> bool:
    start = time.process_time()
    seed = 1_000_000 * (run.seed + 1) + run.updates
    run.evaluated.append(evaluate(run.policy, run.config.episodes, seed=seed).mean().item())
    run.evaluation_seconds += time.process_time() - start
    return run.evaluated[-1] >= run.config.stop_at


def evaluate(policy: nn.Module, episodes: int = 100, *, seed: int) -> Tensor:
    """Returns ``[episodes]`` of the sampled policy; torch's global generator is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return sf.trajectories.rollout(make_env(episodes), policy, episodes).rewards.sum(-1)


def confirm(run: Run) -> Tensor:
    """Returns ``[episodes]`` of further episodes, which had no say in when training stopped."""
    return evaluate(run.policy, run.config.episodes, seed=1_000_000 * (run.seed + 1) + 500_000)


_PLAIN = [f.name for f in fields(Run) if f.name not in ("config", "policy", "optimizer")]


def save(run: Run, path: Path) -> None:
    """Write everything that the rest of the run depends on, in one piece or not at all."""
    state = {name: getattr(run, name) for name in _PLAIN} | {
        "config": asdict(run.config),
        "policy": run.policy.state_dict(),
        "optimizer": run.optimizer.state_dict(),
    }
    write_checkpoint(path, state)


def load(path: Path) -> Run:
    """Read a checkpoint and set torch's generator: environments are reset from it, so nothing else has a state.

    Raises:
        sf.ScorefnError: see ``read_checkpoint``.
    """

    def build(state: dict[str, Any]) -> Run:
        run = new_run(state["seed"], Config(**state["config"]))
        for name in _PLAIN:
            setattr(run, name, state[name])
        run.policy.load_state_dict(state["policy"])
        run.optimizer.load_state_dict(state["optimizer"])
        return run

    return read_checkpoint(path, [*_PLAIN, "config", "policy", "optimizer"], build)


def show(run: Run) -> None:
    """One line that is written over while a seed is trained; only its last state where nobody watches."""
    line = f"seed {run.seed}: update {run.updates:3d}, {run.env_steps:7,d} steps, return {run.returns[-1]:5.1f}"
    if run.evaluated:
        line += f", {run.config.episodes} fresh episodes {run.evaluated[-1]:5.1f}"
    if sys.stdout.isatty():
        print(f"\r{line}\033[K", end="\n" if run.solved else "", flush=True)
    elif run.solved or run.updates % 10 == 0:
        print(line, flush=True)


def row(run: Run, confirmation: Tensor) -> dict[str, float]:
    """What the table says of one seed."""
    return {
        "seed": run.seed,
        "updates": run.updates,
        "env steps": run.env_steps,
        "training CPU s": round(run.train_seconds, 3),
        "evaluations": len(run.evaluated),
        "evaluation CPU s": round(run.evaluation_seconds, 3),
        "stopped at": round(run.evaluated[-1], 2) if run.evaluated else float("nan"),
        "confirmed mean": round(confirmation.mean().item(), 2),
        "confirmed std": round(confirmation.std().item(), 2),
    }


def report(rows: list[dict[str, float]], config: Config) -> str:
    """A table in Markdown, with the medians and the verdict."""
    names = list(rows[0])
    lines = [f"| {' | '.join(names)} |", f"|{'---:|' * len(names)}"]
    lines += [f"| {' | '.join(f'{r[n]:,}' for n in names)} |" for r in rows]
    median = {n: statistics.median(r[n] for r in rows) for n in names if n != "seed"}
    confirmed = sum(r["confirmed mean"] >= config.threshold for r in rows)
    lines += [
        "",
        f"Median: {median['training CPU s']:.2f} CPU seconds of training, {median['env steps']:,.0f} environment "
        f"steps, {median['updates']:g} updates; slowest seed {max(r['training CPU s'] for r in rows):.2f} CPU seconds.",
        f"Confirmed on {config.episodes} further sampled episodes, mean return at least {config.threshold:g}: "
        f"{confirmed} of {len(rows)} seeds, lowest mean {min(r['confirmed mean'] for r in rows):.1f}.",
        f"Python {platform.python_version()}, PyTorch {torch.__version__}, Gymnasium {gymnasium.__version__}, "
        f"{torch.get_num_threads()} torch thread(s).",
    ]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Train, confirm, tabulate; 0 where every seed was confirmed, 130 after Ctrl-C."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, default=10, help="train seeds 0, 1, ..., SEEDS - 1")
    parser.add_argument("--out", type=Path, default=Path("runs/cartpole"), help="where table and checkpoints go")
    parser.add_argument("--resume", type=Path, help="a checkpoint: go on with that seed only")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)  # two threads on so small a network mostly wait for each other
    if arguments.resume:
        try:
            with torch.random.fork_rng(devices=[]):
                load(arguments.resume)
        except sf.ScorefnError as error:
            parser.error(str(error))
    rows, config = [], Config()
    with Interruption() as interrupted:
        for seed in [0] if arguments.resume else range(arguments.seeds):
            checkpoint = arguments.resume or arguments.out / f"seed-{seed}.pt"
            run = train(
                seed,
                progress=show,
                should_stop=interrupted,
                checkpoint=checkpoint,
                resume=arguments.resume,
            )
            if interrupted():
                print(f"\nStopped. Go on with this seed: python -m applications.rl.cartpole --resume {checkpoint}")
                if rows:
                    print(report(rows, config))
                return 130
            config = run.config
            rows.append(row(run, confirm(run)))
    table = report(rows, config)
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "table.md").write_text(table + "\n", encoding="utf-8")
    with (arguments.out / "table.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    print(table)
    return 0 if all(r["confirmed mean"] >= config.threshold for r in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
