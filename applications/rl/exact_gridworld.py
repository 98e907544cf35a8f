"""Bias and variance of every reducer, exactly: ``python -m applications.rl.exact_gridworld --out runs/gridworld``.

A gridworld so small that every trajectory can be written down. Four computations give one policy gradient:

1. the derivative of the sum over all trajectories of probability times return;
2. the score identity: the expectation of what ``scorefn.surrogate`` makes of each trajectory, without the dynamics;
3. the derivative of the value that backward induction finds;
4. the policy gradient theorem, with occupancies and values from two linear systems.

Then every reducer's expectation and variance, by enumeration: no sampling, so that a bias of 1e-9 would be seen.
``tabular_mdp`` asks the first question of random dynamics; here the problem has a picture, and the answer is a table.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import scorefn as sf
from scorefn.trajectories import TemporalDifference, Trajectories

MOVES = ((-1, 0), (1, 0), (0, -1), (0, 1))  # up, down, left, right
EPISODES = 16  # for which leave-one-out is computed


@dataclass(frozen=True)
class Gridworld:
    """``#`` wall, ``S`` start, ``G`` pays 1 and leads back to the start, ``P`` (a pit) costs 1 and does so too.

    A move against a wall or the border goes nowhere, and every move may slip, which goes nowhere either. After
    ``horizon`` steps all is over.
    """

    rows: tuple[str, ...] = ("S..", ".P.", "..G")
    slip: float = 0.2
    horizon: int = 5

    @cached_property
    def cells(self) -> list[tuple[int, int]]:
        """Where one can be: a state is an index into this."""
        return [(i, j) for i, row in enumerate(self.rows) for j, mark in enumerate(row) if mark in "S."]

    @cached_property
    def dynamics(self) -> tuple[Tensor, Tensor]:
        """Probability ``[S, A, S]`` and reward ``[S, A, S]`` of each transition."""
        size = len(self.cells)
        probability, reward = torch.zeros(2, size, len(MOVES), size, dtype=torch.float64)
        for s, (i, j) in enumerate(self.cells):
            for a, (down, right) in enumerate(MOVES):
                mark = self._mark(i + down, j + right)
                target = s if mark == "#" else self.start if mark in "GP" else self.cells.index((i + down, j + right))
                probability[s, a, target] += 1 - self.slip
                probability[s, a, s] += self.slip
                if mark in "GP":
                    reward[s, a, target] = 1.0 if mark == "G" else -1.0
        return probability, reward

    @property
    def start(self) -> int:
        """The first state."""
        return [self._mark(*cell) for cell in self.cells].index("S")

    def _mark(self, i: int, j: int) -> str:
        inside = 0 <= i < len(self.rows) and 0 <= j < len(self.rows[0])
        return self.rows[i][j] if inside else "#"

    def enumerate(self) -> tuple[Trajectories, Tensor]:
        """Every trajectory of positive probability, N of them, and the log-probability of its dynamics ``[N]``.

        An observation is one number, ``step * S + state``, so that a value may depend on the time that is left.
        """
        probability, reward = self.dynamics
        size = len(self.cells)
        source, action, target = probability.nonzero(as_tuple=True)
        paths = [torch.tensor([i]) for i in (source == self.start).nonzero().flatten()]
        for _ in range(self.horizon - 1):
            paths = [torch.cat([p, e[None]]) for p in paths for e in (source == target[p[-1]]).nonzero().flatten()]
        edges = torch.stack(paths)  # [N, T]
        states, actions, following = source[edges], action[edges], target[edges]
        time = torch.arange(self.horizon) * size
        last = torch.zeros(edges.shape, dtype=torch.bool)
        last[:, -1] = True
        tau = Trajectories(
            observations=time + states,
            actions=actions,
            rewards=reward[states, actions, following],
            terminated=last,
            truncated=torch.zeros_like(last),
            mask=torch.ones_like(last),
            next_observations=time + size + following,
            starts=last.roll(1, -1),
        )
        return tau, probability[states, actions, following].log().sum(-1)


class Table(nn.Module):
    """A function of observations that is looked up."""

    def __init__(self, values: Tensor) -> None:
        super().__init__()
        self.register_buffer("values", values)

    def forward(self, observations: Tensor) -> Tensor:
        """``[*batch] -> [*batch]``."""
        return self.values[observations]


class Row(NamedTuple):
    """What is known of one estimator."""

    name: str
    bias: float  # norm of (expectation - gradient), relative to that of the gradient
    cosine: float  # of expectation and gradient
    variance: float  # trace of the covariance of one trajectory's estimate


class Problem:
    """A gridworld, a random softmax policy with one row of logits for each cell, and the objective's discount."""

    def __init__(self, world: Gridworld = Gridworld(), discount: float = 0.9, seed: int = 0) -> None:
        self.world, self.discount = world, discount
        self.tau, self.log_dynamics = world.enumerate()
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn(len(world.cells), len(MOVES), generator=generator, dtype=torch.float64)
        self.logits = noise / 2 + torch.tensor([0.0, 0.8, 0.0, 0.8], dtype=torch.float64)  # down and right are known
        self.probability = (self.log_dynamics + self._log_policy(self.logits).sum(-1)).exp()  # [N]
        self.steps = torch.arange(world.horizon, dtype=torch.float64)

    def _log_policy(self, logits: Tensor) -> Tensor:
        """Log-probability of each action, ``[N, T]``, from logits ``[S, A]`` or ``[N, S, A]``."""
        state = self.tau.observations % len(self.world.cells)
        each = torch.arange(len(state)).unsqueeze(-1)
        chosen = logits.log_softmax(-1)
        return chosen[state, self.tau.actions] if logits.ndim == 2 else chosen[each, state, self.tau.actions]

    # ------------------------------------------------------------------------------------- four times the same gradient

    def gradients(self) -> dict[str, Tensor]:
        """The gradient of the expected discounted return in the logits, ``[S, A]``."""
        logits = self.logits.clone().requires_grad_()
        returns = (self.discount**self.steps * self.tau.rewards).sum(-1)
        summed = (self.log_dynamics + self._log_policy(logits).sum(-1)).exp() @ returns
        return {
            "sum over trajectories": torch.autograd.grad(summed, logits)[0],
            "score identity": self.expectation(self.estimates(self.draws(self.rewards), sf.RewardToGo(self.discount))),
            "backward induction": torch.autograd.grad(self.values(logits)[self.world.start], logits)[0],
            "policy gradient theorem": self._theorem(),
        }

    def values(self, logits: Tensor) -> Tensor:
        """``V_t(s)`` by backward induction, ``[(T + 1) S]``, differentiable: 0 at the end."""
        probability, reward = self.world.dynamics
        following = [torch.zeros(len(self.world.cells), dtype=torch.float64)]
        for _ in range(self.world.horizon):
            action_values = (probability * (reward + self.discount * following[0])).sum(-1)
            following.insert(0, (logits.softmax(-1) * action_values).sum(-1))
        return torch.cat(following)

    @cached_property
    def _chain(self) -> Tensor:
        """Probability of each move between observations under the policy, ``[T S, T S]``; the last lead nowhere."""
        between = torch.einsum("sa,saz->sz", self.logits.softmax(-1), self.world.dynamics[0])
        later = torch.diag(torch.ones(self.world.horizon - 1, dtype=torch.float64), 1)
        return torch.kron(later, between)

    @cached_property
    def occupancy(self) -> Tensor:
        """How likely each observation is at its step, ``(I - P^T) d = start``, ``[T, S]``."""
        start = torch.zeros(len(self._chain), dtype=torch.float64)
        start[self.world.start] = 1.0
        found: Tensor = torch.linalg.solve(torch.eye(len(start), dtype=torch.float64) - self._chain.T, start)
        return found.view(self.world.horizon, -1)

    def _theorem(self) -> Tensor:
        """``sum_t discount^t sum_s d_t(s) sum_a Q_t(s, a) grad policy(a | s)``, Sutton et al. (2000), theorem 1."""
        probability, reward = self.world.dynamics
        policy = self.logits.softmax(-1)
        earned = torch.einsum("sa,saz,saz->s", policy, probability, reward).repeat(self.world.horizon)
        identity = torch.eye(len(self._chain), dtype=torch.float64)
        value = torch.linalg.solve(identity - self.discount * self._chain, earned).view(self.world.horizon, -1)
        beyond = torch.cat([value[1:], torch.zeros_like(value[:1])])
        action_value = (probability * (reward + self.discount * beyond[:, None, None])).sum(-1)  # [T, S, A]
        advantage = action_value - value.unsqueeze(-1)
        weight = self.discount ** self.steps[:, None] * self.occupancy
        return (weight.unsqueeze(-1) * policy * advantage).sum(0)

    # --------------------------------------------------------------------------------------- estimators and their table

    def rewards(self, tau: Trajectories) -> Tensor:
        """The reward of each step, ``[N, T]``."""
        return tau.rewards

    def draws(self, f: Any) -> sf.Draws:
        """All trajectories as draws; each has a copy of the logits of its own, so that each has its own gradient."""
        self.copies = self.logits.expand(len(self.probability), -1, -1).clone().requires_grad_()
        return sf.Draws(self.tau, self._log_policy(self.copies), f(self.tau), context=self.tau.observations)

    def estimates(self, draws: sf.Draws, credit: Any, baseline: Any = None) -> Tensor:
        """What each trajectory would estimate, ``[N, S, A]``."""
        surrogate = sf.surrogate(draws, credit=credit, baseline=baseline)
        return torch.autograd.grad(surrogate.sum(), self.copies)[0]

    def expectation(self, values: Tensor) -> Tensor:
        """``E[values]`` over trajectories, ``[N, ...] -> [...]``."""
        return torch.tensordot(self.probability, values, 1)

    @cached_property
    def scores(self) -> Tensor:
        """``grad log policy`` of each step in all logits, ``[N, T, S A]``."""
        log_prob = self.draws(self.rewards).log_prob
        steps = [torch.autograd.grad(column.sum(), self.copies, retain_graph=True)[0] for column in log_prob.unbind(-1)]
        return torch.stack(steps, 1).flatten(2)

    def independent(self, name: str, estimates: Tensor) -> Row:
        """The row of an estimator whose trajectories do not meet."""
        mean = self.expectation(estimates)
        return self._row(name, mean, float(self.expectation((estimates - mean).square().sum((-2, -1)))))

    def leave_one_out(self, name: str, signal: Tensor, episodes: int = EPISODES) -> Row:
        """The row of signal ``[N, T]`` minus the mean of the other ``episodes - 1``, per trajectory.

        The batch's estimate is the mean over all pairs of ``h(x, y) = sum_k (f_k(x) - f_k(y)) (s_k(x) - s_k(y)) / 2``,
        with s the scores, so that its variance is ``2 ((n - 2) 2 Var(E[h | x]) + Var(h)) / (n (n - 1))`` (Hoeffding,
        1948); times n it is that of one trajectory. Moments of f and s give both.
        """
        s, n = self.scores, episodes
        charged = torch.einsum("nk,nkp->np", signal, s)
        mean, mean_signal = self.expectation(charged), self.expectation(signal)
        # E[h | x]: the scores' expectation is 0, so that two of the four products vanish
        given = (charged + mean - torch.einsum("k,nkp->np", mean_signal, s)) / 2
        first = float(self.expectation((given - mean).square().sum(-1)))
        signals = torch.einsum("n,nk,nl->kl", self.probability, signal, signal)
        score_products = torch.einsum("n,nkp,nlp->kl", self.probability, s, s)
        mixed = torch.einsum("n,nk,nlp->klp", self.probability, signal, s)  # E[f_k s_l]
        with_mean = self.expectation((charged * torch.einsum("k,nkp->np", mean_signal, s)).sum(-1))
        square = (
            self.expectation(charged.square().sum(-1)) + mean.square().sum() + (signals * score_products).sum()
            + torch.einsum("klp,lkp->", mixed, mixed) - 2 * with_mean
        ) / 2  # fmt: skip
        both = float(square - mean.square().sum())
        return self._row(name, mean.view_as(self.logits), 2 * (2 * (n - 2) * first + both) / (n - 1))

    def _row(self, name: str, mean: Tensor, variance: float) -> Row:
        exact = self._theorem()
        bias = (mean - exact).norm() / exact.norm()
        return Row(name, float(bias), float((mean * exact).sum() / mean.norm() / exact.norm()), variance)

    def wrong_values(self) -> Tensor:
        """The best value function that does not know the time: least squares over the policy's visits."""
        size, horizon = len(self.world.cells), self.world.horizon
        true = self.values(self.logits)[: horizon * size].view(horizon, size)
        mean = (self.occupancy * true).sum(0) / self.occupancy.sum(0).clamp(min=1e-12)
        return torch.cat([mean.repeat(horizon), torch.zeros(size, dtype=torch.float64)])

    def optimal_constants(self, signal: Tensor) -> Tensor:
        """One constant for each step, ``[T]``, which together have the least variance.

        ``b_k = E[(sum_l f_l s_l) . s_k] / E[|s_k|^2]``: scores of different steps are uncorrelated.
        """
        charged = torch.einsum("nk,nkp->np", signal, self.scores)
        covariance = self.expectation(torch.einsum("np,nkp->nk", charged, self.scores))
        return covariance / self.expectation(self.scores.square().sum(-1))

    def adaptive(self) -> sf.AdaptiveRaoBlackwell:
        """The past rewards as a control, with the averages that it tends to."""
        draws = self.draws(self.rewards).bound(sf.RewardToGo(self.discount))
        signal, past = draws.signal(), draws.uninfluenced
        centred, control = signal - self.expectation(signal), past - self.expectation(past)
        reducer = sf.AdaptiveRaoBlackwell()
        reducer.covariance, reducer.variance = self.expectation(centred * control), self.expectation(control.square())
        return reducer

    def table(self) -> list[Row]:
        """Every reducer."""
        discount, weight = self.discount, self.discount**self.steps
        to_go = sf.RewardToGo(discount)
        plain = sf.RewardToGo(discount, visitation_discount=False)
        true, wrong = self.values(self.logits).detach(), self.wrong_values()
        time = weight.repeat_interleave(len(self.world.cells))  # discount^t of each observation
        draws = self.draws(self.rewards)
        past, signal = draws.bound(to_go).uninfluenced, draws.signal(to_go)
        adapted = signal + self.adaptive().coefficient(signal) * past
        constants = self.optimal_constants(signal)
        returns = (weight * self.tau.rewards).sum(-1, keepdim=True).expand(-1, self.world.horizon)

        def total(tau: Trajectories) -> Tensor:
            return (weight * tau.rewards).sum(-1, keepdim=True)

        def row(name: str, f: Any, credit: Any, baseline: Any = None) -> Row:
            return self.independent(name, self.estimates(self.draws(f), credit, baseline))

        rows = [
            row("total return", total, sf.Total()),
            self.leave_one_out("total return, leave-one-out", returns),
            row("reward-to-go", self.rewards, to_go),
            row("reward-to-go, without discount^t", self.rewards, plain),
            self.leave_one_out("reward-to-go, leave-one-out", signal),
            self.leave_one_out("reward-to-go, past rewards adaptive", adapted),
            row("reward-to-go, optimal constants", self.rewards, to_go, sf.Constant(constants)),
            row("reward-to-go, true V", self.rewards, to_go, sf.ValueFunction(Table(time * true[: len(time)]))),
            row(
                "reward-to-go, V without time", self.rewards, to_go, sf.ValueFunction(Table(time * wrong[: len(time)]))
            ),
        ]
        for label, values in (("true V", true), ("V without time", wrong)):
            errors = TemporalDifference(Table(values), discount)
            for lambda_ in (0.0, 0.5, 0.9, 1.0):
                # discount^t delta_t, charged with lambda alone, is discount^t times the advantage
                credit = sf.RewardToGo(lambda_, visitation_discount=False)
                rows.append(row(f"GAE {lambda_:g}, {label}", lambda tau, e=errors: weight * e(tau), credit))
        errors = TemporalDifference(Table(true), discount)
        usual = sf.RewardToGo(0.9 * discount, visitation_discount=False)
        rows.append(row("GAE 0.9, true V, without discount^t", errors, usual))
        return rows


def lines(problem: Problem, rows: list[Row]) -> list[str]:
    """The report, line by line, in Markdown."""
    gradients = problem.gradients()
    stacked = torch.stack(list(gradients.values()))
    value = float(problem.values(problem.logits)[problem.world.start])
    report = [
        f"{len(problem.probability):,} trajectories of {problem.world.horizon} steps, discount {problem.discount:g}, "
        f"expected return {value:.6f}, gradient of norm {gradients['sum over trajectories'].norm():.6f}.",
        f"{', '.join(gradients)}: largest difference between any two {(stacked.amax(0) - stacked.amin(0)).max():.1e}.",
        "",
        "| estimator | bias | cosine | variance | of the total's |",
        "|---|---:|---:|---:|---:|",
    ]
    for row in rows:
        bias = "0" if row.bias < 1e-12 else f"{100 * row.bias:.2f} %"
        share = f"{100 * row.variance / rows[0].variance:.1f} %"
        report.append(f"| {row.name} | {bias} | {row.cosine:.4f} | {row.variance:.5f} | {share} |")
    return report


def plot(problem: Problem, rows: list[Row], path: Path) -> None:
    """The world with its policy and values; variance and bias of every estimator."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 5.5), layout="constrained")
    world, bars, biases = figure.subplots(1, 3, width_ratios=[1, 1.5, 0.8])
    values = torch.full((len(problem.world.rows), len(problem.world.rows[0])), float("nan"), dtype=torch.float64)
    for s, cell in enumerate(problem.world.cells):
        values[cell] = problem.values(problem.logits)[s]
    image = world.imshow(values.numpy(), cmap="viridis", alpha=0.6)
    for i, line in enumerate(problem.world.rows):
        for j, mark in enumerate(line):
            if mark != ".":
                text = {"S": "start", "G": "goal +1", "P": "pit -1", "#": "wall"}[mark]
                world.text(j, i - 0.38, text, ha="center", va="center", fontsize="small")
    for (i, j), policy in zip(problem.world.cells, problem.logits.softmax(-1), strict=True):
        for (down, right), p in zip(MOVES, policy.tolist(), strict=True):
            head = {"head_width": 0.09 * p**0.5, "head_length": 0.09 * p**0.5, "length_includes_head": True}
            world.arrow(j, i, 0.45 * p * right, 0.45 * p * down, width=0.012, color="black", **head)
    world.set(xticks=[], yticks=[], title="policy, and values of the first step")
    figure.colorbar(image, ax=world, location="bottom", shrink=0.8)
    names = [row.name for row in rows]
    colours = ["tab:blue" if row.bias < 1e-12 else "tab:orange" for row in rows]
    bars.barh(names, [row.variance for row in rows], color=colours)
    bars.invert_yaxis()
    bars.set(xlabel="per trajectory, trace of the covariance", title="variance (blue: unbiased, orange: biased)")
    biases.barh(names, [100 * row.bias for row in rows], color=colours)
    biases.invert_yaxis()
    biases.set(xlabel="% of the gradient's norm", title="bias", yticks=[])
    figure.savefig(path, dpi=120)


def main(argv: list[str] | None = None) -> int:
    """Print the table, draw it; 0 where the gradients agree."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, help="where gridworld.md and gridworld.png go")
    parser.add_argument("--discount", type=float, default=0.9)
    parser.add_argument("--horizon", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0, help="of the policy")
    arguments = parser.parse_args(argv)
    problem = Problem(Gridworld(horizon=arguments.horizon), arguments.discount, arguments.seed)
    rows = problem.table()
    report = "\n".join(lines(problem, rows))
    print(report)
    if arguments.out is not None:
        arguments.out.mkdir(parents=True, exist_ok=True)
        (arguments.out / "gridworld.md").write_text(report + "\n", encoding="utf-8")
        plot(problem, rows, arguments.out / "gridworld.png")
    stacked = torch.stack(list(problem.gradients().values()))
    return 0 if float((stacked.amax(0) - stacked.amin(0)).max()) < 1e-10 else 1


if __name__ == "__main__":
    sys.exit(main())
