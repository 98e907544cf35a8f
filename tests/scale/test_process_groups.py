"""Two gloo processes are one process with the draws of both: exactly what one process computes is the oracle."""

from __future__ import annotations

import copy
import pickle
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import scorefn as sf
from scorefn.graph.credit import together
from scorefn.scale import World, all_reduce_gradients, gather_over_ranks, process_groups, shared_denominator
from tests.scale.rank_cases import CASES, EVERYTHING, draws, theta

ROOT = Path(__file__).parents[2]
HALVES = [sf.LeaveOneOut, sf.Standardize, sf.CenteredRank, sf.NESUtilities]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of the two processes found."""
    folder = tmp_path_factory.mktemp("ranks")
    command = [sys.executable, "-m", "tests.scale.rank_cases"]
    jobs = [
        subprocess.Popen([*command, str(rank), str(folder)], cwd=ROOT, stderr=subprocess.PIPE, text=True)
        for rank in (0, 1)
    ]
    try:
        errors = [job.communicate(timeout=120)[1] for job in jobs]
    finally:
        for job in jobs:
            job.kill()
    assert [job.returncode for job in jobs] == [0, 1], "\n".join(errors)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in (0, 1)]


@pytest.mark.parametrize("name", CASES)
@pytest.mark.usefixtures("float64")
def test_two_ranks_are_one_process(name: str, ranks: list[dict[str, Any]]) -> None:
    whole = CASES[name](None, EVERYTHING)
    bound = 0.0 if "Rank" in name or "NES" in name else 1e-12
    if name == "Standardize far from 0":  # the values are a millionth apart; sums of squares would be wrong by 1e-5
        bound = 1e-9
    for found in ranks:
        torch.testing.assert_close(found[name], whole, rtol=bound, atol=bound)


def test_the_ranks_agree_to_the_bit(ranks: list[dict[str, Any]]) -> None:
    assert all(torch.equal(ranks[0][name], ranks[1][name]) for name in CASES)


@pytest.mark.usefixtures("float64")
def test_the_mean_over_ranks_of_local_baselines_is_another_gradient(ranks: list[dict[str, Any]]) -> None:
    """The tests above can fail: without the group, leave-one-out and denominators are those of a part."""
    for name in ("leave-one-out, plain", "token mean", "Standardize"):
        parts = [CASES[name](None, part) for part in (slice(0, 4), slice(4, 6))]
        local = torch.cat(parts) if name == "Standardize" else sum(parts) / 2
        assert (local - ranks[0][name]).abs().max() > 1e-3


def test_a_group_of_one_is_no_group_to_the_bit(ranks: list[dict[str, Any]]) -> None:
    for found in ranks:
        assert [name for name, same in found["alone"].items() if not same] == []


def test_one_draw_a_rank_is_enough(ranks: list[dict[str, Any]]) -> None:
    """Two draws: each is compared with the other, ``(f_0 - f_1)(s_0 - s_1) / 2``."""
    p = theta()[0].double().sigmoid()
    x = []
    for rank in (0, 1):
        torch.manual_seed(rank)
        x.append(torch.bernoulli(p.detach()))
    exact = (x[0].sum() - x[1].sum()) * (x[0] - x[1]) / 2
    for found in ranks:
        torch.testing.assert_close(found["graph"][0], exact, rtol=0, atol=1e-12)
        assert not found["graph"][0].eq(0).all()


def test_singletons_are_counted_over_ranks(ranks: list[dict[str, Any]]) -> None:
    assert [found["singletons"] for found in ranks] == [(1, 1), (1, 1)]  # their labels are 7 and -3


def test_missing_gradients(ranks: list[dict[str, Any]]) -> None:
    for found in ranks:
        unused, sometimes = found["missing gradients"]
        assert unused is None
        assert sometimes.tolist() == [0.5, 0.5]


REFUSALS = {
    "unequal K": (
        "ScorefnError: LeaveOneOut adds over processes, but the number of decisions K differs between them: 2 on rank "
        "0, 3 on rank 1. Only masked decisions"
    ),
    "unequal B": r"the batch shape \[\*B\] differs between them: \(1,\) on rank 0, \(2,\) on rank 1. Give every rank",
    "group on one": "whether draws.group is given differs between them: no groups on rank 0, groups on rank 1",
    "other calls": r"is about to add what (LeaveOneOut|Standardize) needs, but rank\(s\) \[(0|1)\] something else",
    "NaN": r"NonFiniteError: Standardize was given a NaN or infinite value on rank\(s\) \[1\], which has no distance",
    "other values": r"the shape of one row differs between them: \(1,\) on rank 0, \(2,\) on rank 1",
    "other dtypes": "the dtype differs between them: torch.float32 on rank 0, torch.float64 on rank 1",
    "other parameters": "what it was given differs between them: 1 tensors of 2 entries .* on rank 0, 1 tensors of 3",
    "a count below 0": r"A count on rank\(s\) \[1\] is negative, NaN or infinite",
    "no counts": "add up to 0, which nothing can be divided by",
    "booleans": "sum_over_ranks was given torch.bool, which cannot be added over processes: convert it",
    "not a member": "to a process that is no member of the group: it has no part in that group's sums",
    "one block": r"but the 1 draw\(s\) of 1 process\(es\) form 1: there is no other draw",
    "vmap": "which a torch.func transform or torch.compile cannot trace: leave process_group out",
    "NaN observation": "NonFiniteError: Observations are NaN or infinite in (0|1) of 2 steps",
}


@pytest.mark.parametrize("name", REFUSALS)
def test_every_rank_refuses_and_none_waits(name: str, ranks: list[dict[str, Any]]) -> None:
    for found in ranks:
        assert re.search(REFUSALS[name], found["refusals"][name])


def test_a_lost_rank_is_an_error_and_no_hang(ranks: list[dict[str, Any]]) -> None:
    for name in ("silent", "lost"):
        told, seconds, *grad = ranks[0][name]
        assert re.match(r"LostRankError: Rank 0 could not add to the others \(\w+: .*Start it again from its", told)
        assert seconds < 20
        assert all(bool((g == 1).all()) for g in grad)  # nothing was changed
    assert issubclass(sf.LostRankError, sf.ScorefnError)


@pytest.mark.parametrize("part", HALVES)
def test_they_stay_small_frozen_values(part: Any) -> None:
    assert repr(part()) == f"{part.__name__}()"
    assert repr(part(World())) == f"{part.__name__}(process_group=World())"
    assert part() == part(None) != part(World()) == part(World())
    assert len({part(), part(), part(World()), part(World())}) == 2
    assert pickle.loads(pickle.dumps(part(World()))) == copy.deepcopy(part(World())) == part(World())
    for wrong, message in (("world", "process_group='world' is no process group"), (World, "write World\\(\\)")):
        with pytest.raises(sf.ScorefnError, match=message):
            part(wrong)


def test_without_a_group_torch_distributed_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def touched(*_: Any, **__: Any) -> None:
        raise AssertionError("torch.distributed was used")

    for name in ("all_reduce", "is_available", "is_initialized", "get_rank", "get_world_size"):
        monkeypatch.setattr(dist, name, touched)
    some = draws(theta(), EVERYTHING, group=True)
    sf.surrogate(some, baseline=sf.LeaveOneOut())
    for shape in HALVES[1:]:
        shape()(some.fx)


@pytest.mark.parametrize(
    "call",
    [
        lambda some: sf.LeaveOneOut(World())(some.signal(), some),
        lambda some: sf.Standardize(World())(some.fx),
        lambda some: sf.CenteredRank(World())(some.fx),
        lambda some: shared_denominator(3),
        lambda some: gather_over_ranks(some.fx),
        lambda some: all_reduce_gradients(torch.zeros(2, requires_grad=True)),
    ],
)
def test_before_the_processes_are_started(call: Any) -> None:
    some = draws(theta(), EVERYTHING)
    with pytest.raises(sf.ScorefnError, match="has not been started: start the program with torchrun and call"):
        call(some)


def test_gradients_that_cannot_be_added() -> None:
    with pytest.raises(sf.ScorefnError, match="was given no tensor that requires grad: pass module.parameters"):
        all_reduce_gradients([torch.zeros(2)])
    embedding = torch.nn.Embedding(4, 2, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(sf.ScorefnError, match="sparse=False"):
        all_reduce_gradients(embedding.parameters())
    meta = torch.zeros(2, requires_grad=True, device="meta")
    with pytest.raises(sf.ScorefnError, match=r"lie on \['cpu', 'meta'\], but one all-reduce adds on one device"):
        all_reduce_gradients([meta, torch.zeros(1, requires_grad=True)])
    with pytest.raises(sf.ShapeError, match=r"joins rows, but v has shape \(\)"):
        gather_over_ranks(torch.tensor(1.0))


def test_sites_of_a_graph_keep_their_own_group() -> None:
    """Sites without a group and with one are not read together; those of equal baselines are."""
    local, world = sf.LeaveOneOut(), sf.LeaveOneOut(World())
    assert together([(0, 1, local), (1, 1, sf.LeaveOneOut())], 2) is local
    assert together([(0, 1, world), (1, 1, sf.LeaveOneOut(World()))], 2) is world
    assert together([(0, 1, local), (1, 1, world)], 2) not in (local, world)


def test_one_particle_a_rank_is_enough() -> None:
    pytest.importorskip("pyro")
    sf.posteriors.ScoreFunctionELBO(num_particles=1, baseline=sf.LeaveOneOut(World()))
    with pytest.raises(sf.ScorefnError, match="made from the others, but num_particles is 1"):
        sf.posteriors.ScoreFunctionELBO(num_particles=1, baseline=sf.LeaveOneOut())


@pytest.mark.parametrize(
    ("call", "fact"),
    [
        (lambda: sf.scale.sum_over_ranks([1.0]), r"^sum_over_ranks takes a tensor, but it was given \[1.0\]"),
        (lambda: sf.scale.gather_over_ranks(3), "^gather_over_ranks takes a tensor, but it was given 3"),
        (lambda: sf.scale.shared_denominator("a"), "^A count must be a number or a tensor of numbers, but it is 'a'"),
        (lambda: sf.scale.shared_denominator(None), "but it is None"),
        (lambda: sf.scale.all_reduce_gradients(None), "^params must be tensors, but it is None"),
    ],
)
def test_rubbish_is_refused_before_anything_is_sent(call, fact, monkeypatch):
    for name in ("meet", "greet", "gathered"):
        monkeypatch.setattr(process_groups, name, lambda *_: pytest.fail("something was sent"))
    with pytest.raises(sf.ScorefnError, match=fact):
        call()
