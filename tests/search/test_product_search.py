"""Products of strategies."""

import copy
import io
import itertools

import pytest
import torch

import scorefn as sf
from scorefn.search import CSANES, SNES, BernoulliSearch, CategoricalSearch, ProductSearch, run
from tests.search.states import same


def product(seed=0, **limits):
    return ProductSearch(
        {
            "x": CSANES([3.0, -2.0, 1.0], 1.0, popsize=10, seed=seed),
            "kind": CategoricalSearch([3, 2], popsize=10, seed=seed + 100),
        },
        **limits,
    )


def shifted(x):
    """The minimum is 0 at kind = (2, 1), x = 2; every wrong kind makes the valley of x steeper."""
    wrong = (x["kind"] != torch.tensor([2, 1])).sum(1)
    return (1 + wrong) * (x["x"] - 2).square().sum(1) + wrong


# --- products --------------------------------------------------------------------------------------------------------


def test_every_block_learns_what_it_would_alone_from_the_same_ranks():
    together = product()
    alone = dict(product().blocks)
    x = together.ask()
    for name, block in alone.items():
        assert torch.equal(block.ask(), x[name])
    f = shifted(x)
    together.tell(x, f)
    for name, block in alone.items():
        block.tell(x[name], f)
        assert same(together.state_dict()["blocks"][name]["sigma0"], block.state_dict()["sigma0"])
        assert torch.equal(together.result.mean[name], block.result.mean)
        assert torch.equal(together.result.sigma[name], block.result.sigma)


def test_the_product_of_scores_is_the_score_of_the_product():
    """With u fixed, the gradient of E u in each block is the one that block takes: by enumeration of both parts."""
    bits = torch.tensor([0.3, 0.6], dtype=torch.float64, requires_grad=True)
    kind = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64, requires_grad=True)
    u = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    points = torch.tensor(list(itertools.product((0.0, 1.0), repeat=2)), dtype=torch.float64)
    chance = (bits * points + (1 - bits) * (1 - points)).prod(1)
    gradient = torch.autograd.grad((chance[:, None] * kind * u).sum(), (bits, kind))
    with torch.no_grad():
        score = (points - bits) / (bits * (1 - bits))
        marginal = torch.einsum("a,k,ak,ad->d", chance, kind, u, score)
    torch.testing.assert_close(marginal, gradient[0], rtol=0, atol=1e-12)


def test_mixed_problems_are_solved():
    for seed in range(5):
        result = run(product(seed, ftarget=1e-8, maxfevals=20_000), shifted, vectorized=True)
        assert result.success
        assert result.best_x["kind"].tolist() == [2, 1]
        assert result.best_x["kind"].dtype == torch.int64
        torch.testing.assert_close(result.best_x["x"], torch.full((3,), 2.0, dtype=torch.float64), rtol=0, atol=1e-3)


def test_a_flat_generation_leaves_every_block_to_the_bit():
    strategy = product()
    strategy.tell(x := strategy.ask(), shifted(x))
    x = strategy.ask()
    before = strategy.state_dict()["blocks"]
    strategy.tell(x, torch.ones(10))
    assert same(before, strategy.state_dict()["blocks"])
    for _ in range(10):
        strategy.tell(x, torch.ones(10))
    assert strategy.stop == {"tolflatfitness": 10}


def test_a_resumed_product_equals_an_uninterrupted_one_to_the_bit():
    strategy = product()
    for _ in range(4):
        strategy.tell(x := strategy.ask(), shifted(x))
    file = io.BytesIO()
    torch.save(strategy.state_dict(), file)
    file.seek(0)
    resumed = product(seed=7)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    for _ in range(4):
        x, y = strategy.ask(), resumed.ask()
        assert same(x, y)
        strategy.tell(x, shifted(x))
        resumed.tell(y, shifted(y))
    assert same(strategy.state_dict(), resumed.state_dict())


def test_bad_parts_are_refused_and_no_block_learns():
    strategy = product()
    x = strategy.ask()
    before = strategy.state_dict()
    f = shifted(x)
    for bad, message in (
        (x["x"], "parts"),
        ({"x": x["x"]}, "parts"),
        ({**x, "kind": x["kind"] + 0.5}, "integers from 0 to"),
        ({**x, "x": x["x"][:5]}, "whole generation"),
        ({**x, "x": x["x"] * 1e308 * 10}, "not finite"),
    ):
        with pytest.raises(sf.ScorefnError, match=message):
            strategy.tell(bad, f)
    with pytest.raises(sf.ShapeError):
        strategy.tell(x, f[:3])
    assert same(before, strategy.state_dict())


def test_blocks_that_make_no_product_are_refused():
    snes = SNES([0.0], 1.0, popsize=6)
    for blocks, message in (
        ({}, "at least one"),
        ({"a": 3}, "cannot be a part"),
        ({"a": product()}, "cannot be a part"),
        ({"a": snes, "b": BernoulliSearch(3, popsize=8)}, "popsize=8"),
        ({"a": snes, "b": snes}, "two blocks"),
    ):
        with pytest.raises(sf.ScorefnError, match=message):
            ProductSearch(blocks)
    snes.tell(snes.ask(), torch.arange(6.0))
    with pytest.raises(sf.ScorefnError, match="told something before"):
        ProductSearch({"a": snes})


def test_states_of_other_products_are_refused_and_nothing_changes():
    strategy = product()
    before = strategy.state_dict()
    good = copy.deepcopy(before)
    broken = {**good, "blocks": {**good["blocks"], "kind": {**good["blocks"]["kind"], "table": torch.ones(1, 1)}}}
    for state in ({}, {**good, "blocks": {"x": good["blocks"]["x"]}}, broken):
        with pytest.raises(sf.ScorefnError):
            strategy.load_state_dict(state)
        assert same(before, strategy.state_dict())


def test_blocks_that_would_draw_the_same_are_refused():
    with pytest.raises(sf.ScorefnError, match=r"blocks 'x' and 'y' .*same random numbers.*seed of its own"):
        ProductSearch({"x": SNES([0.0], 1.0, popsize=8, seed=3), "y": SNES([1.0], 1.0, popsize=8, seed=3)})
    blocks = {"x": SNES([0.0], 1.0, popsize=8, seed=3), "y": SNES([1.0], 1.0, popsize=8, seed=4)}
    assert ProductSearch(blocks).popsize == 8
