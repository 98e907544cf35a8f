"""What each of two gloo processes computes for its tests: ``python -m tests.scale.rank_cases RANK FOLDER``.

A case is a function of a process group and a part of the draws, so that one process can run it on all of them.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributions import Bernoulli, Categorical

import scorefn as sf
from scorefn.scale import World, all_reduce_gradients, gather_over_ranks, shared_denominator, sum_over_ranks
from scorefn.trajectories import TokenMean

EVERYTHING = slice(0, 6)
PARTS = [slice(0, 4), slice(4, 6)]
LABELS = torch.tensor([7, -3, 7, 40, -3, 7])
BLOCKS = torch.tensor([0, 0, 1, 1, 0, 0]), torch.tensor([0, 0, 1, 1, 2, 2])  # as two ranks number them, and as one does
PRESENT = torch.tensor([[1, 1, 0], [1, 0, 0], [1, 1, 0], [0, 1, 0], [1, 1, 1], [1, 1, 0]], dtype=torch.bool)


def theta() -> Tensor:
    return torch.tensor([[0.3, -0.2, 0.5], [0.1, 0.7, -0.4]], dtype=torch.float64, requires_grad=True)


def draws(
    at: Tensor, part: slice, *, mask: bool = False, block: bool = False, group: bool = False, narrow: bool = False
) -> sf.Draws:
    """Draws of two problems and three decisions, the same whoever makes them; narrow: without columns all absent."""
    generator = torch.Generator().manual_seed(5)
    x = (torch.rand(6, 2, 3, generator=generator, dtype=torch.float64) < 0.5).double()
    fx = torch.randn(6, 2, 3, generator=generator, dtype=torch.float64) + 3
    present = PRESENT.unsqueeze(1).expand(6, 2, 3)
    log_prob = Bernoulli(logits=at).log_prob(x)
    width = 2 if narrow and part == PARTS[0] else 3
    labels = BLOCKS[1] if part == EVERYTHING else BLOCKS[0]
    return sf.Draws(
        x[part],
        log_prob[part][..., :width],
        torch.where(present, fx, 0.0)[part][..., :width] if mask else fx[part],
        credit=sf.RewardToGo(0.9),
        mask=present[part][..., :width] if mask else None,
        block=labels[part] if block else None,
        group=LABELS[part] if group else None,
    )


OPTIONS: dict[str, dict[str, bool]] = {
    "plain": {},
    "mask": {"mask": True},
    "unequal K": {"mask": True, "narrow": True},
    "block": {"block": True},
    "group": {"group": True},
    "block and group": {"block": True, "group": True},
    "all": {"mask": True, "narrow": True, "block": True, "group": True},
}


def gradient(loss: Tensor, at: Tensor, world: World | None) -> Tensor:
    loss.backward()
    if world is not None:
        all_reduce_gradients(at, world)
    return at.grad


def leave_one_out(options: dict[str, bool]) -> Callable[[World | None, slice], Tensor]:
    def case(world: World | None, part: slice) -> Tensor:
        at = theta()
        some = draws(at, part, **options)
        number = len(some) if world is None else shared_denominator(len(some), world)
        surrogate = sf.surrogate(some, baseline=sf.LeaveOneOut(world))
        return gradient(surrogate.sum() / number, at, world)

    return case


def shaped(shape: type[sf.Standardize], values: Tensor) -> Callable[[World | None, slice], Tensor]:
    return lambda world, part: gathered(shape(world)(values[part]), world)


def gathered(v: Tensor, world: World | None) -> Tensor:
    return v if world is None else gather_over_ranks(v, world)


def token_mean(world: World | None, part: slice) -> Tensor:
    at = theta()
    some = draws(at, part, mask=True)
    tokens = some.mask[:, 0].sum()
    weight = TokenMean(float(tokens) if world is None else shared_denominator(tokens, world))(some)
    surrogate = sf.surrogate(some, baseline=sf.LeaveOneOut(world))
    return gradient((surrogate.unsqueeze(-1) * weight).sum(), at, world)


def per_problem(world: World | None, part: slice) -> Tensor:
    counts = draws(theta(), part, mask=True).mask.sum((0, 2))
    return counts.double() if world is None else 2 * shared_denominator(counts, world)


def normalization(world: World | None, part: slice) -> Tensor:
    norm = sf.trajectories.ObservationNormalization(2, process_group=world)
    for scale in (1.0, 3.0):
        norm.update(scale * VALUES[part, :2] + 1e6, torch.tensor([True, False, True, True, False, False])[part])
    return torch.cat([norm.mean, norm.variance, norm.count.double().unsqueeze(0)])


def ddp(world: World | None, part: slice) -> Tensor:
    """``DistributedDataParallel`` averages over ranks itself."""
    module = nn.Linear(2, 3)
    nn.init.constant_(module.weight, 0.3)
    nn.init.zeros_(module.bias)
    policy = module if world is None else nn.parallel.DistributedDataParallel(module)
    inputs = VALUES[:, :2] / 2
    p = Categorical(logits=policy(inputs[part]))
    x = torch.tensor([0, 2, 1, 1, 0, 2])[part]
    some = sf.Draws(x, p.log_prob(x).unsqueeze(-1), VALUES[part, :1])
    number = len(some) if world is None else shared_denominator(len(some), world)
    (sf.surrogate(some, baseline=sf.LeaveOneOut(world)).sum() / number).backward()
    return torch.cat([p.grad.flatten() for p in module.parameters()])


VALUES = torch.tensor(
    [[3.0, 1e-3, 5], [1, 2e-3, 5], [4, 1e-3, 5], [1, 7e-3, 5], [5, 1e-3, 5], [9, 2e-3, 5]], dtype=torch.float64
)
CASES: dict[str, Callable[[World | None, slice], Tensor]] = {
    **{f"leave-one-out, {name}": leave_one_out(options) for name, options in OPTIONS.items()},
    "Standardize": shaped(sf.Standardize, VALUES),
    "Standardize far from 0": shaped(sf.Standardize, VALUES[:, :1] + 1e6),
    "Standardize of huge values": shaped(sf.Standardize, VALUES * 1e300),
    "CenteredRank": shaped(sf.CenteredRank, VALUES),
    "CenteredRank of failures": shaped(sf.CenteredRank, VALUES.where(VALUES != 4, torch.nan)),
    "CenteredRank of integers": shaped(sf.CenteredRank, (2**60 + VALUES[:, :1].long())),
    "NESUtilities": shaped(sf.NESUtilities, VALUES),
    "token mean": token_mean,
    "a denominator for each problem": per_problem,
    "normalisation": normalization,
    "DDP": ddp,
}


def told(call: Callable[[], Any]) -> str:
    """What it refuses with."""
    try:
        call()
    except sf.ScorefnError as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def refusals(rank: int) -> dict[str, str]:
    at, world, mine = theta(), World(), PARTS[rank]
    own = torch.ones(2 + rank, requires_grad=True)
    own.grad = torch.full_like(own, 7.0)
    some, masked = draws(at, mine), draws(at, mine, mask=True, narrow=True)
    lengths = sf.Draws(masked.x, masked.log_prob, masked.fx, credit=sf.RewardToGo())  # unequal K without a mask
    value = torch.tensor([[1.0], [torch.nan if rank else 2.0]])
    base = sf.LeaveOneOut(world)
    alone = [dist.new_group([0]), dist.new_group([1])]
    vmapped = torch.func.vmap(lambda v: sf.Standardize(world)(v))
    found = {
        "unequal K": told(lambda: base(lengths.signal(), lengths)),
        "unequal B": told(lambda: base(some.signal()[:, : 1 + rank], some)),
        "group on one": told(lambda: sf.surrogate(draws(at, mine, group=rank == 1), baseline=base)),
        "other calls": told(lambda: base(some.signal(), some) if rank else sf.Standardize(world)(some.fx)),
        "NaN": told(lambda: sf.Standardize(world)(value)),
        "other values": told(lambda: sf.Standardize(world)(VALUES[:, : 1 + rank])),
        "other dtypes": told(lambda: sf.Standardize(world)(VALUES.to([torch.float32, torch.float64][rank]))),
        "other parameters": told(lambda: all_reduce_gradients([own], world)),
        "a count below 0": told(lambda: shared_denominator(-rank)),
        "no counts": told(lambda: shared_denominator(torch.zeros(2))),
        "booleans": told(lambda: sum_over_ranks(torch.ones(2, dtype=torch.bool))),
        "not a member": told(lambda: base.__class__(alone[1 - rank])),
        "one block": told(lambda: sf.LeaveOneOut(alone[rank])(some[:1].signal(), some[:1])),
        "vmap": told(lambda: vmapped(VALUES.unsqueeze(0))),
        "NaN observation": told(lambda: sf.trajectories.ObservationNormalization(1, process_group=world).update(value)),
    }
    assert own.grad.tolist() == [7.0] * len(own)  # a refusal leaves gradients as they were
    return found


def main(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    store = dist.FileStore(str(folder / "store"), 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=60))
    found: dict[str, Any] = {name: case(World(), PARTS[rank]) for name, case in CASES.items()}
    found["refusals"] = refusals(rank)

    alone = [dist.new_group([0]), dist.new_group([1])][rank]
    found["alone"] = {}
    for name, options in OPTIONS.items():
        some = draws(theta(), EVERYTHING, **options)
        for dtype in (torch.float64, torch.float32):
            signal = some.signal().to(dtype)
            pair = [sf.LeaveOneOut(group)(signal, some) for group in (None, alone)]
            found["alone"][f"{name}, {dtype}"] = torch.equal(*pair)
    for shape in (sf.Standardize, sf.CenteredRank, sf.NESUtilities):
        for values in (VALUES, VALUES.float(), VALUES[:1]):
            found["alone"][f"{shape.__name__}, {values.dtype}, {len(values)}"] = torch.equal(
                shape()(values), shape(alone)(values)
            )

    at = theta()
    one = draws(at, slice(rank, rank + 1), group=True)
    found["singletons"] = sf.LeaveOneOut(World()).singletons(one), sf.LeaveOneOut().singletons(one)
    p = Bernoulli(logits=at[0])
    torch.manual_seed(rank)
    value = sf.expectation(p, lambda x: x.sum(-1), 1, baseline=sf.LeaveOneOut(World()))
    found["one draw"] = gradient(value, at, World())
    torch.manual_seed(rank)
    at = theta()
    with sf.StochasticGraph(num_samples=1) as graph:
        x = graph.sample(
            "x", torch.distributions.Independent(Bernoulli(logits=at[0]), 1), baseline=sf.LeaveOneOut(World())
        )
        graph.cost("sum", x.sum(-1))
    found["graph"] = gradient(graph.surrogate().mean(), at, World())
    unused = torch.zeros(3, requires_grad=True)
    sometimes = torch.zeros(2, requires_grad=True)
    if rank == 1:
        sometimes.grad = torch.ones(2)
    all_reduce_gradients([unused, sometimes])
    found["missing gradients"] = unused.grad, sometimes.grad

    short = dist.new_group([0, 1], timeout=timedelta(seconds=1))
    begin = time.monotonic()
    if rank == 0:
        found["silent"] = told(lambda: sum_over_ranks(torch.ones(1), short)), time.monotonic() - begin
    dist.barrier()
    if rank == 1:
        torch.save(found, folder / "1.pt")
        os._exit(1)
    at = theta()
    at.grad = torch.ones_like(at)
    begin = time.monotonic()
    found["lost"] = told(lambda: all_reduce_gradients(at)), time.monotonic() - begin, at.grad
    torch.save(found, folder / "0.pt")
    os._exit(0)


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
