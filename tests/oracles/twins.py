"""Values, and slow twins of fast code."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import scorefn as sf
from tests.oracles.baselines import BASELINES
from tests.oracles.settings import CREDITS, Setting, setting
from tests.oracles.tolerances import VISIBLE, near
from tests.oracles.toys import values


def check_value(given: Setting, credit_name: str, baseline_name: str, entry: str) -> None:
    """The value of each draw is the weighted f, to the bit on-policy without discount."""
    row = CREDITS[credit_name]
    credit = row.make(given)
    draws, baseline = given.draws, BASELINES[baseline_name](given, credit)
    ours = {"surrogate": sf.surrogate, "dice": sf.dice}[entry](draws, credit=credit, baseline=baseline).detach()
    where = f"{entry}, {credit_name}, {baseline_name}, on {given}"
    weighted = draws.fx.detach()
    if row.discount != 1.0:
        weighted = weighted * torch.tensor([row.discount**age for age in given.toy.age], dtype=torch.float64)
    if given.off_policy:
        log_ratio = (draws.log_prob - draws.behaviour_log_prob).detach()
        influence = torch.ones_like(given.toy.influence) if credit_name == "Total()" else given.toy.influence
        weighted = weighted * torch.einsum("kj,...k->...j", influence.double(), log_ratio).exp()
    truth = weighted.sum(-1)
    if not given.off_policy and row.discount == 1.0:
        assert torch.equal(ours, truth), f"{where}: the value is not f to the bit"
    gap = float((ours - truth).abs().max())
    assert gap < 1e-12, f"{where}: the value is off by {gap:.3g}"


def check_microbatches(dtype: torch.dtype, tolerance: float) -> None:
    """With the baseline read once on the whole batch, any split gives the gradient of the whole."""
    given, N = setting("ended", "N=1", True), 12
    rows = torch.randint(given.choice.shape[1], (N,), generator=torch.Generator().manual_seed(3))
    paths, toy = given.paths, given.toy
    draws = sf.Draws(
        x=rows,
        log_prob=paths.log_prob[0, rows].to(dtype),
        fx=paths.fx[0, rows].to(dtype),
        credit=sf.RewardToGo(0.9, done=torch.tensor([[False, True]]).expand(N, 2)),
        behaviour_log_prob=given.behaviour.log_prob[0, rows].to(dtype),
        mask=toy.mask[rows],
        block=torch.tensor([0, 0, 1, 2, 3, 4, 4, 5, 6, 7, 8, 9]),
        group=torch.tensor([0, 0, 0, 1, 1, 1, 1, 0, 2, 2, 2, 2]),
    )
    read = sf.LeaveOneOut()(draws.signal(), draws)

    def gradient(loss: Tensor) -> Tensor:
        parts = torch.autograd.grad(loss, given.parameters, retain_graph=True)
        return torch.cat([part.flatten() for part in parts])

    whole = gradient(sf.surrogate(draws, baseline=sf.LeaveOneOut()).mean(0))
    assert whole.abs().max() > VISIBLE
    for cuts in ((12,), (5, 7), (1, 10, 1), (1,) * 12, (3, 1, 8), (2, 1, 2, 1, 2, 1, 3)):
        parts = torch.arange(N).split(cuts)
        total = sum(gradient(sf.surrogate(draws[i], baseline=sf.Constant(read[i])).sum(0) / N) for i in parts)
        gap = float((total - whole).abs().max())
        assert gap < tolerance, f"microbatches {cuts} in {dtype}: the gradient is off by {gap:.3g}"


def dense_reward_to_go(done: Tensor) -> Tensor:
    """`[K, J]`: step k influences the values from k on, as far as its episode goes."""
    T = len(done)
    episode = torch.cat([torch.zeros(1, dtype=torch.long), done.long().cumsum(0)[:-1]])
    return torch.ones(T, T, dtype=torch.bool).triu() & (episode[:, None] == episode[None, :])


def check_adjoint(credit: sf.core.Credit, v: Tensor, u: Tensor) -> None:
    """`<influence(v), u> == <v, influence_adjoint(u)>`; what has size 1 stands for K or J equal entries."""
    left = (credit.influence(v) * u).sum()
    right = (v * credit.influence_adjoint(u)).sum()
    assert near(left, right), f"{credit}: adjoint: {left.item()} and {right.item()}"


def check_twin(credit: sf.core.Credit, dense: Tensor, v: Tensor, u: Tensor) -> None:
    """A fast credit is its matrix, in `influence`, its adjoint and its predecessors, on `[..., J]` and `[..., K]`."""
    twin = sf.Influence(dense)
    for name, argument in (("influence", v), ("influence_adjoint", u), ("predecessors", u)):
        ours, theirs = getattr(credit, name)(argument), getattr(twin, name)(argument)
        gap = float((ours - theirs).abs().max())
        assert gap < 1e-11, f"{credit}: {name} differs from its matrix by {gap:.3g}:\n{ours}\n{theirs}"
    for name, argument, equation in (("influence", v, "kj,...j->...k"), ("influence_adjoint", u, "kj,...k->...j")):
        brute = torch.einsum(equation, dense.to(v), argument)
        gap = float((getattr(twin, name)(argument) - brute).abs().max())
        assert gap < 1e-11, f"Influence: {name} is not the matrix product, by {gap:.3g}"


def check_identity(credit: sf.core.Credit, v: Tensor, ages: Tensor, discount: float, visitation: bool) -> None:
    """`credit(v) == decision_weight * (M @ (value_weight * v))`, and the weights are powers of the discount."""
    value_weight, decision_weight = credit.value_weight(v), credit.decision_weight(v)
    if discount == 1.0:
        assert decision_weight is None
    else:
        assert near(value_weight.expand_as(v), discount**ages), f"{credit}: value_weight"
        if visitation:
            assert decision_weight is None
        else:
            inverse = discount**-ages
            assert near(decision_weight.expand_as(v), inverse), f"{credit}: decision_weight"
    weighed = v if value_weight is None else value_weight * v
    definition = credit.influence(weighed)
    if decision_weight is not None:
        definition = decision_weight * definition
    assert near(credit(v), definition), f"{credit}: {credit(v)} and {definition}"


def plain_recurrence(x: Tensor, decay: Tensor, reverse: bool) -> Tensor:
    """The loop, along the first axis."""
    order = range(len(x) - 1, -1, -1) if reverse else range(len(x))
    y: list[Any] = [None] * len(x)
    last = None
    for t in order:
        y[t] = x[t] if last is None else x[t] + decay[t] * last
        last = y[t]
    return torch.stack(y)


def check_recurrence(x: Tensor, decay: Tensor | float, reverse: bool, dim: int) -> None:
    """`linear_recurrence` is the loop, and so are its gradients."""
    x = x.detach().requires_grad_()
    inputs: tuple[Tensor, ...] = (x,)
    if isinstance(decay, Tensor):
        decay = decay.detach().requires_grad_()
        inputs = (x, decay) if x.shape[dim] > 1 else inputs
    ours = sf.linear_recurrence(x, decay, reverse=reverse, dim=dim)
    spread = torch.as_tensor(decay, dtype=x.dtype).expand(x.shape).movedim(dim, 0)
    theirs = plain_recurrence(x.movedim(dim, 0), spread, reverse).movedim(0, dim)
    gap = float((ours - theirs).detach().abs().max())
    assert gap < 1e-11, f"linear_recurrence, reverse={reverse}, dim={dim}: off by {gap:.3g}"
    direction = values(x.shape, 16)
    gradients = [torch.autograd.grad((y * direction).sum(), inputs) for y in (ours, theirs)]
    for mine, true in zip(*gradients, strict=True):
        gap = float((mine - true).abs().max())
        assert gap < 1e-11, f"linear_recurrence, reverse={reverse}, dim={dim}: its gradient is off by {gap:.3g}"
