"""A model that learns to copy from rewards alone: ``python -m applications.rl.sequence --method rloo --seeds 5``.

The prompt is 3 to 7 symbols out of 14; the response shall be the same symbols, then the end token. A program checks it
and gives the share of places that are right. A GRU with attention to the prompt, from random weights, writes
8 responses to each of 32 prompts, each compared with the other 7: by leave-one-out (``rloo``, one step of Adam on each
batch) or as GRPO does (``grpo``, two steps on each batch, the second one off-policy), with a small KL to uniform
tokens subtracted. Training stops when the mean reward of a batch and then that of fresh prompts are high enough;
further prompts, which decide nothing, are what is reported.

Ctrl-C stops at the next update and writes a checkpoint; ``--resume FILE`` goes on from it, bit for bit.
"""

from __future__ import annotations

import argparse
import math
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

import scorefn as sf
from applications.checkpoint import read_checkpoint, write_checkpoint
from applications.over_seeds import bootstrap
from applications.progress import Interruption
from applications.results import write_result

VOCABULARY = 16  # the end token, the start token and 14 symbols
LENGTH = 8  # of a response, the end token included
END, START, FIRST = 0, 1, 2


@dataclass(frozen=True)
class Config:
    """What a run depends on, apart from its seed."""

    method: str = "rloo"
    prompts: int = 32  # of each batch
    group: int = 8  # responses to each prompt
    steps: int = 1  # of Adam on each batch
    hidden: int = 64
    learning_rate: float = 0.002
    kl_weight: float = 0.01  # of the KL to uniform tokens: without it a seed may settle before it has tried everything
    max_norm: float = 1.0  # that gradients are clipped to
    threshold: float = 0.95  # mean reward at which a seed counts as solved
    stop_at: float = 0.98  # mean reward, of a batch and of fresh prompts, at which training stops: a margin over it
    evaluated: int = 512  # prompts of each evaluation
    max_updates: int = 5000


CONFIGS = {"rloo": Config(), "grpo": Config(method="grpo", steps=2)}


# ------------------------------------------------------------------------------------------------------------ the task


def new_prompts(num: int) -> Tensor:
    """Symbols, then END up to LENGTH: ``[num, LENGTH]``, of 3 to LENGTH - 1 symbols."""
    symbols = torch.randint(FIRST, VOCABULARY, (num, LENGTH))
    length = torch.randint(3, LENGTH, (num, 1))
    return torch.where(torch.arange(LENGTH) < length, symbols, END)


def written(responses: Tensor) -> Tensor:
    """Which tokens were written, up to and with the first END: bool, the mask of the draws."""
    ends = responses == END
    return ends.cumsum(-1) - ends.long() == 0


def reward(prompts: Tensor, responses: Tensor) -> Tensor:
    """The share of right places, END's included; of the longer one where lengths differ: ``[N]`` in [0, 1]."""
    mask, wanted = written(responses), written(prompts)
    right = (responses == prompts) & mask & wanted
    return right.sum(-1) / torch.maximum(mask.sum(-1), wanted.sum(-1))


# ----------------------------------------------------------------------------------------------------------- the model


class Writer(nn.Module):
    """A GRU over what it has written, which looks at the prompt by attention."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.token = nn.Embedding(VOCABULARY, hidden)
        self.place = nn.Parameter(0.3 * torch.randn(LENGTH, hidden))
        self.gru = nn.GRU(hidden, hidden, batch_first=True)
        self.question = nn.Linear(hidden, hidden)
        self.answer = nn.Linear(2 * hidden, VOCABULARY)

    def log_softmax(self, prompts: Tensor, before: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Log-probabilities of the token after each of ``before`` ``[N, T]``, and the GRU's state."""
        memory = self.token(prompts) + self.place
        hidden, state = self.gru(self.token(before), state)
        looks = (self.question(hidden) @ memory.transpose(1, 2) / memory.shape[-1] ** 0.5).softmax(-1)
        return self.answer(torch.cat([hidden, looks @ memory], -1)).log_softmax(-1), state

    @torch.no_grad()
    def write(self, prompts: Tensor, *, greedy: bool = False) -> Tensor:
        """Responses ``[N, LENGTH]``, token by token; what stands after END means nothing."""
        token, state, tokens = torch.full((len(prompts), 1), START), None, []
        for _ in range(LENGTH):
            log_prob, state = self.log_softmax(prompts, token, state)
            token = log_prob[:, 0].argmax(-1, keepdim=True) if greedy else torch.multinomial(log_prob[:, 0].exp(), 1)
            tokens.append(token)
        return torch.cat(tokens, -1)

    def forward(self, prompts: Tensor, responses: Tensor) -> Tensor:
        """Log-probability of each token of the responses, ``[N, LENGTH]``, all at once."""
        before = torch.cat([torch.full((len(responses), 1), START), responses[:, :-1]], -1)
        return self.log_softmax(prompts, before)[0].gather(-1, responses.unsqueeze(-1)).squeeze(-1)


# -------------------------------------------------------------------------------------------------------- the training


@dataclass
class Run:
    """One seed: the trained model and how it came about."""

    seed: int
    config: Config
    model: Writer
    optimizer: torch.optim.Adam
    updates: int = 0  # batches
    train_seconds: float = 0.0  # CPU seconds of writing, checking, scoring and updating
    wall_seconds: float = 0.0
    evaluation_seconds: float = 0.0  # CPU seconds of the stopping rule's evaluations
    rewards: list[float] = field(default_factory=list)  # mean of each batch
    evaluated: list[float] = field(default_factory=list)  # mean of each of the stopping rule's evaluations
    degenerate: list[int] = field(default_factory=list)  # groups of each batch whose rewards are all the same
    sample_size: list[float] = field(default_factory=list)  # effective, at the last step on each batch
    clipped: list[float] = field(default_factory=list)  # share of tokens that the clip silenced, likewise
    solved: bool = False


def new_run(seed: int, config: Config) -> Run:
    """A fresh model, drawn from torch's global generator."""
    model = Writer(config.hidden)
    return Run(seed, config, model, torch.optim.Adam(model.parameters(), lr=config.learning_rate))


def train(
    seed: int,
    config: Config = CONFIGS["rloo"],
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
        while not run.solved and run.updates < run.config.max_updates:
            start, wall = time.process_time(), time.perf_counter()
            _update(run)
            run.train_seconds += time.process_time() - start
            run.wall_seconds += time.perf_counter() - wall
            run.solved = run.rewards[-1] >= run.config.stop_at and _confirms(run)
            if progress is not None:
                progress(run)
            if should_stop():
                if checkpoint is not None:
                    save(run, checkpoint)
                break
    return run


def _update(run: Run) -> None:
    """One batch: write, check, and go uphill."""
    config, behaviour = run.config, None
    recipe = {"rloo": sf.trajectories.rloo, "grpo": sf.trajectories.grpo}[config.method]
    prompts = new_prompts(config.prompts).repeat_interleave(config.group, 0)
    group = torch.arange(config.prompts).repeat_interleave(config.group)
    responses = run.model.write(prompts)
    worth = reward(prompts, responses)
    uniform = torch.full(responses.shape, -math.log(VOCABULARY))
    for _ in range(config.steps):
        logp = run.model(prompts, responses)
        draws = sf.trajectories.sequence_draws(
            logp, worth, mask=written(responses), group=group, behaviour_logp=behaviour
        )
        objective = recipe(draws)
        run.optimizer.zero_grad()
        kl = sf.trajectories.kl_surrogate(draws, uniform, estimator="k1", baseline=sf.LeaveOneOut())
        (config.kl_weight * kl.mean() - objective.value).backward()
        nn.utils.clip_grad_norm_(run.model.parameters(), config.max_norm)
        run.optimizer.step()
        behaviour = logp.detach() if behaviour is None else behaviour
    run.updates += 1
    run.rewards.append(worth.mean().item())
    run.degenerate.append(objective.degenerate_groups)
    run.sample_size.append(float(objective.effective_sample_size))
    run.clipped.append(float(objective.clip_fraction))


def _confirms(run: Run) -> bool:
    start = time.process_time()
    seed = 1_000_000 * (run.seed + 1) + run.updates
    run.evaluated.append(evaluate(run.model, run.config.evaluated, seed=seed).mean().item())
    run.evaluation_seconds += time.process_time() - start
    return run.evaluated[-1] >= run.config.stop_at


def evaluate(model: Writer, prompts: int, *, seed: int, greedy: bool = False) -> Tensor:
    """Rewards ``[prompts]`` on fresh prompts; torch's global generator is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        asked = new_prompts(prompts)
        return reward(asked, model.write(asked, greedy=greedy))


# ------------------------------------------------------------------------------------------------------- what is kept

_PLAIN = [f.name for f in fields(Run) if f.name not in ("config", "model", "optimizer")]


def save(run: Run, path: Path) -> None:
    """Write everything that the rest of the run depends on, in one piece or not at all."""
    state = {name: getattr(run, name) for name in _PLAIN} | {
        "config": asdict(run.config),
        "model": run.model.state_dict(),
        "optimizer": run.optimizer.state_dict(),
    }
    write_checkpoint(path, state)


def load(path: Path) -> Run:
    """Read a checkpoint and set torch's generator.

    Raises:
        sf.ScorefnError: see ``read_checkpoint``.
    """

    def build(state: dict[str, Any]) -> Run:
        run = new_run(state["seed"], Config(**state["config"]))
        for name in _PLAIN:
            setattr(run, name, state[name])
        run.model.load_state_dict(state["model"])
        run.optimizer.load_state_dict(state["optimizer"])
        return run

    return read_checkpoint(path, [*_PLAIN, "config", "model", "optimizer"], build)


def result(run: Run) -> dict[str, Any]:
    """What is said of one seed, after two evaluations on the same fresh prompts that had no say in when to stop."""
    num, seed = 4 * run.config.evaluated, 1_000_000 * (run.seed + 1) + 500_000
    sampled, greedy = (evaluate(run.model, num, seed=seed, greedy=greedy) for greedy in (False, True))
    return {
        "method": run.config.method,
        "seed": run.seed,
        "updates": run.updates,
        "sequences": run.updates * run.config.prompts * run.config.group,
        "cpu_seconds": round(run.train_seconds, 2),
        "wall_seconds": round(run.wall_seconds, 2),
        "evaluation_cpu_seconds": round(run.evaluation_seconds, 2),
        "eval_sampled_mean": round(sampled.mean().item(), 4),
        "eval_sampled_std": round(sampled.std().item(), 4),
        "eval_sampled_perfect": round((sampled == 1).float().mean().item(), 4),
        "eval_greedy_mean": round(greedy.mean().item(), 4),
        "eval_greedy_perfect": round((greedy == 1).float().mean().item(), 4),
        "sequences_evaluated": num,
        "degenerate_groups_mean": round(sum(run.degenerate) / len(run.degenerate), 2),
        "effective_sample_size_mean": round(sum(run.sample_size) / len(run.sample_size), 1),
        "clip_fraction_mean": round(sum(run.clipped) / len(run.clipped), 4),
    }


def show(run: Run) -> None:
    """A line every 100 updates and at the end."""
    if run.solved or run.updates % 100 == 0:
        recent = run.rewards[-20:]
        line = f"{run.config.method} seed {run.seed}: update {run.updates:4d}, {run.train_seconds:5.1f} CPU s, "
        line += (
            f"reward {sum(recent) / len(recent):.3f}, degenerate groups {run.degenerate[-1]} of {run.config.prompts}"
        )
        if run.config.steps > 1:
            line += f", effective sample size {run.sample_size[-1]:.0f}, clipped {run.clipped[-1]:.3f}"
        print(line + (f", fresh prompts {run.evaluated[-1]:.3f}" if run.evaluated else ""), flush=True)


def report(results: list[dict[str, Any]], config: Config) -> str:
    """A table in Markdown, with interquartile means and the verdict."""
    names = {
        "seed": "seed", "updates": "updates", "sequences": "sequences", "cpu_seconds": "training CPU s",
        "eval_sampled_mean": "sampled", "eval_sampled_perfect": "all right", "eval_greedy_mean": "greedy",
        "eval_greedy_perfect": "all right, greedy", "degenerate_groups_mean": "degenerate groups",
        "effective_sample_size_mean": "effective sample size", "clip_fraction_mean": "clipped",
    }  # fmt: skip
    lines = [f"| {' | '.join(names.values())} |", f"|{'---:|' * len(names)}"]
    lines += [f"| {' | '.join(f'{r[name]:,}' for name in names)} |" for r in results]
    solved = sum(r["eval_sampled_mean"] >= config.threshold for r in results)
    lines.append("")
    for key, name, digits in (
        ("eval_sampled_mean", "reward, sampled", 3), ("eval_greedy_mean", "reward, greedy", 3),
        ("cpu_seconds", "CPU seconds of training", 1), ("updates", "updates", 0),
    ):  # fmt: skip
        middle, low, high = bootstrap([r[key] for r in results])
        lines.append(f"* {name}: {middle:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]")
    lines += [
        "",
        f"Interquartile means over {len(results)} seed(s) with 95 % bootstrap intervals; {solved} of {len(results)} "
        f"seeds at {config.threshold:g} or more on {results[0]['sequences_evaluated']} further prompts, sampled.",
        f"Python {platform.python_version()}, PyTorch {torch.__version__}, {torch.get_num_threads()} torch thread(s).",
    ]
    return "\n".join(lines)


def plot(runs: list[Run], path: Path) -> None:
    """Mean reward of each batch, one line a seed."""
    figure = Figure(figsize=(6, 3.5), layout="constrained")
    axes = figure.add_subplot()
    for run in runs:
        axes.plot(run.rewards, linewidth=0.8, label=f"seed {run.seed}")
    axes.axhline(runs[0].config.threshold, color="grey", linewidth=0.6)
    axes.set(xlabel="update", ylabel="mean reward of the batch", ylim=(0, 1), title=runs[0].config.method)
    axes.legend()
    figure.savefig(path, dpi=120)


def main(argv: list[str] | None = None) -> int:
    """Train, evaluate, tabulate; 0 where every seed was solved, 130 after Ctrl-C."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--method", choices=sorted(CONFIGS), default="rloo")
    parser.add_argument("--seed", type=int, default=0, help="the first seed")
    parser.add_argument("--seeds", type=int, default=5, help="how many seeds, one after the other")
    parser.add_argument("--out", type=Path, help="where results, curve and checkpoints go; runs/sequence-METHOD")
    parser.add_argument("--max-updates", type=int, help="give up after so many updates")
    parser.add_argument("--resume", type=Path, help="a checkpoint: go on with that seed only")
    arguments = parser.parse_args(argv)
    config = CONFIGS[arguments.method]
    if arguments.max_updates is not None:
        config = Config(**asdict(config) | {"max_updates": arguments.max_updates})
    out = arguments.out or Path(f"runs/sequence-{arguments.method}")
    torch.set_num_threads(1)  # two threads on so small a network mostly wait for each other
    if arguments.resume:
        try:
            with torch.random.fork_rng(devices=[]):
                load(arguments.resume)
        except sf.ScorefnError as error:
            parser.error(str(error))
    runs: list[Run] = []
    with Interruption() as interrupted:
        for seed in [0] if arguments.resume else range(arguments.seed, arguments.seed + arguments.seeds):
            checkpoint = arguments.resume or out / f"seed-{seed}.pt"
            run = train(
                seed,
                config,
                progress=show,
                should_stop=interrupted,
                checkpoint=checkpoint,
                resume=arguments.resume,
            )
            if interrupted():
                print(f"Stopped. Go on with this seed: python -m applications.rl.sequence --resume {checkpoint}")
                return 130
            config = run.config
            runs.append(run)
    results = [result(run) for run in runs]
    told = {"task": "copy", "config": asdict(config), "torch": torch.__version__, "runs": results}
    write_result(out, vars(arguments), told)
    table = report(results, config)
    (out / "table.md").write_text(table + "\n", encoding="utf-8")
    plot(runs, out / "curve.png")
    print(table)
    return 0 if all(r["eval_sampled_mean"] >= config.threshold for r in results) else 1


if __name__ == "__main__":
    sys.exit(main())
