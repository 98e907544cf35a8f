"""Train a policy: ``python -m applications.rl.train --env CartPole-v1 --seed 0 --out runs/cartpole-0``.

One loop (``training.py``) for every environment and method; ``settings.py`` has the rows.

In ``--out``: ``result.json``, ``curve.png``, TensorBoard events, ``checkpoint.pt``. Ctrl-C stops after the present
update; ``--resume`` goes on from the last checkpoint, bit for bit, because the streams start anew at each checkpoint.

``torchrun --nproc_per_node=2 -m applications.rl.train ...`` deals the streams of each update out to processes; see
``ranks.py``. Baselines, standardisation, normalisation, value function and step are those of the whole batch, so that
the number of processes changes which random numbers are drawn, and nothing else. Rank 0 writes; the meters of gradient
noise, entropy, KL and R2 are those of its streams. A process that is lost ends the job; ``--resume`` goes on with as
many processes (bit for bit) or another number that divides the streams.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

import scorefn as sf
from applications.progress import Interruption
from applications.results import write_result
from applications.rl.evaluation import draw_curve, record, result
from applications.rl.ranks import Ranks, ranks_of_torchrun
from applications.rl.settings import METHODS, settings_for
from applications.rl.training import Training


def train(
    training: Training,
    out: Path,
    *,
    progress: Callable[[Training, dict[str, float]], None] | None = None,
    should_stop: Callable[[], bool] = lambda: False,
) -> bool:
    """Update until finished, with a checkpoint in ``out`` whenever the streams start anew; False where stopped."""
    out.mkdir(parents=True, exist_ok=True)
    checkpoint = out / "checkpoint.pt"
    ranks = training.ranks
    if ranks.any(not checkpoint.exists()) or training.updates == 0:
        training.save(checkpoint)
    while not training.finished:
        meters = training.update()
        if progress is not None:
            progress(training, meters)
        if training.updates % training.settings.checkpoint_every == 0 or training.finished:
            training.save(checkpoint)
        if ranks.any(should_stop()):
            return training.finished
    return True


def tensorboard(out: Path, first_step: int) -> Callable[[Training, dict[str, float]], None]:
    """A progress function that writes scalars."""
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(out), purge_step=first_step)

    def write(training: Training, meters: dict[str, float]) -> None:
        scalars = meters | {"steps per CPU second": training.env_steps / max(training.cpu_seconds, 1e-9)}
        if training.curve:
            scalars["return"] = training.curve[-1][1]
        for name, number in scalars.items():
            writer.add_scalar(name, number, training.env_steps)

    return write


def show(training: Training, meters: dict[str, float]) -> None:
    """One line, written over while somebody watches."""
    mean = training.curve[-1][1] if training.curve else float("nan")
    line = (
        f"{training.settings.env} seed {training.seed}: {training.env_steps:9,d} of {training.settings.total_steps:,d} "
        f"steps, return {mean:8.1f}, {training.env_steps / max(training.cpu_seconds, 1e-9):,.0f} steps per CPU second"
    )
    if sys.stdout.isatty():
        print(f"\r{line}\033[K", end="\n" if training.finished else "", flush=True)
    elif training.finished or training.updates % 20 == 0:
        print(line, flush=True)


def _begin(arguments: argparse.Namespace, ranks: Ranks) -> tuple[Training, Path]:
    """The run that the command line asks for, new or resumed, and its folder."""
    for name, value, least in (
        ("--episodes", arguments.episodes, 2),
        ("--total-steps", arguments.total_steps, 1),
        ("--checkpoint-every", arguments.checkpoint_every, 1),
    ):
        if value is not None and value < least:
            raise sf.ScorefnError(f"{name} is {value}, but it must be at least {least}.")
    if arguments.lambda_ is not None and not 0.0 <= arguments.lambda_ <= 1.0:
        raise sf.ScorefnError(f"--lambda is {arguments.lambda_}, but it must lie in [0, 1].")
    settings = settings_for(arguments.env, arguments.method)
    changed = {
        "total_steps": arguments.total_steps,
        "lambda_": arguments.lambda_,
        "checkpoint_every": arguments.checkpoint_every,
    }
    settings = replace(settings, **{name: value for name, value in changed.items() if value is not None})
    if arguments.not_normalized:
        settings = replace(settings, normalize_observations=False, standardize_advantages=False)
    seed = 0 if arguments.seed is None else arguments.seed
    out = arguments.out or Path("runs") / f"{settings.env}-{settings.method}-{seed}"
    checkpoint = out / "checkpoint.pt"
    if arguments.resume:
        training = Training.load(checkpoint, settings, ranks)
        if arguments.seed not in (None, training.seed):
            raise sf.ScorefnError(
                f"{checkpoint} is of seed {training.seed}, but --seed is {arguments.seed}: leave --seed out, or choose "
                "another folder."
            )
        ranks.check_same(f"{training.seed} {training.updates} {training.settings}")
        return training, out
    if checkpoint.exists():
        raise sf.ScorefnError(
            f"{checkpoint} belongs to an earlier run, which a new one would overwrite: add --resume to go on with it, "
            "or choose another folder with --out."
        )
    out.mkdir(parents=True, exist_ok=True)
    training = Training(settings, seed, ranks)
    ranks.check_same(f"{seed} {settings}")  # behind this, rank 0 may write the checkpoint that the others looked for
    return training, out


def main(argv: list[str] | None = None) -> int:
    """Train, evaluate, write; 130 after Ctrl-C."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--env", default="CartPole-v1")
    parser.add_argument("--method", choices=METHODS, help="default: the environment's own, see settings.py")
    parser.add_argument("--seed", type=int, help="decides everything; default: 0")
    parser.add_argument("--out", type=Path, help="default: runs/ENV-METHOD-SEED")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out")
    parser.add_argument("--record", action="store_true", help="write a GIF of a greedy episode")
    parser.add_argument("--total-steps", type=int, help="in place of the table's")
    parser.add_argument(
        "--checkpoint-every", type=int, help="updates, in place of the table's; 1: a kill costs one update at most"
    )
    parser.add_argument("--lambda", dest="lambda_", type=float, help="in place of the table's")
    parser.add_argument("--not-normalized", action="store_true", help="neither observations nor advantages")
    parser.add_argument("--episodes", type=int, default=100, help="of each evaluation")
    parser.add_argument(
        "--rank-timeout", type=float, default=300.0, help="seconds after which a process that does not answer is lost"
    )
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)  # two threads on so small a network mostly wait for each other
    if not arguments.rank_timeout > 0:
        parser.error(f"--rank-timeout is {arguments.rank_timeout}, but it must be positive.")
    try:
        with ranks_of_torchrun(arguments.rank_timeout) as ranks:
            return _run(parser, arguments, ranks)
    except sf.LostRankError as error:
        print(f"{error} (torchrun ... --resume)", file=sys.stderr, flush=True)
        return 1


def _run(parser: argparse.ArgumentParser, arguments: argparse.Namespace, ranks: Ranks) -> int:
    try:
        training, out = _begin(arguments, ranks)
    except sf.LostRankError:
        raise
    except (sf.ScorefnError, OSError) as error:
        parser.error(str(error))
    checkpoint = out / "checkpoint.pt"
    with Interruption() as interrupted:
        write = tensorboard(out, training.env_steps) if ranks.rank == 0 else None

        def progress(training: Training, meters: dict[str, float]) -> None:
            if write is not None:
                show(training, meters)
                write(training, meters)

        if not train(training, out, progress=progress, should_stop=interrupted):
            if ranks.rank == 0:
                print(f"\nStopped. Go on with --resume from the last checkpoint, {checkpoint}.")
            return 130
    if ranks.rank > 0:
        return 0
    figures = result(training, arguments.episodes)
    write_result(out, vars(arguments), figures)
    draw_curve(training, out / "curve.png")
    if arguments.record:
        record(training, out / "episode.gif")
    print(json.dumps({name: value for name, value in figures.items() if name != "settings"}, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
