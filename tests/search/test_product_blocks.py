"""What the blocks of a product may be made with, and what is said where they do not fit; the line of a mixed search."""

import copy

import pytest
import torch

import scorefn as sf
from scorefn.scale import Checkpoint
from scorefn.scale.checkpoint import read_state, write_atomically
from scorefn.search import CSANES, PGPE, BernoulliSearch, CategoricalSearch, IntegerSearch, ProductSearch, run
from tests.search.states import same


def cost(x):
    return x["x"].square().sum(1) + (x["kind"] != 1).sum(1)


def product(*, x=None, kind=None, **limits):
    return ProductSearch(
        {
            "x": CSANES([1.0, 2.0], 0.5, popsize=8, seed=0) if x is None else x,
            "kind": CategoricalSearch([3, 2], popsize=8, seed=1) if kind is None else kind,
        },
        **limits,
    )


@pytest.mark.parametrize(
    ("limit", "value"),
    [("ftarget", 1e-8), ("maxfevals", 800), ("maxiter", 50), ("tolx", 1e-4), ("tolstagnation", 0), ("tolfailed", 3)],
)
@pytest.mark.parametrize(
    "make",
    [
        lambda **limit: CSANES([0.0], 1.0, popsize=8, seed=5, **limit),
        lambda **limit: PGPE([0.0], 1.0, popsize=8, seed=5, **limit),
        lambda **limit: BernoulliSearch(3, popsize=8, seed=5, **limit),
        lambda **limit: IntegerSearch([0], [9], popsize=8, seed=5, **limit),
    ],
)
def test_a_limit_of_a_block_is_refused_as_it_would_be_ignored(make, limit, value):
    message = (
        rf"The block 'b' was made with {limit}={value!r}, which would be ignored: .* the product's own\. Leave it out "
        rf"there, and say ProductSearch\(blocks, {limit}={value!r}\)\."
    )
    with pytest.raises(sf.ScorefnError, match=message):
        ProductSearch({"b": make(**{limit: value})})
    assert ProductSearch({"b": make()}, **{limit: value}).popsize == 8


def test_a_limit_that_is_the_default_or_also_the_products_is_no_surprise():
    told = CSANES([1.0, 2.0], 0.5, popsize=8, seed=0, ftarget=None, tolx=1e-11, tolfun=0)  # a product has tolfun=0
    product(x=told)
    product(x=CSANES([1.0, 2.0], 0.5, popsize=8, seed=0, ftarget=1e-3), ftarget=1e-3)
    product(tolfun=1e-9, tolflatfitness=2)  # other ones than the blocks' defaults
    with pytest.raises(sf.ScorefnError, match=r"block 'x' was made with ftarget=0\.001"):
        product(x=CSANES([1.0, 2.0], 0.5, popsize=8, seed=0, ftarget=1e-3), ftarget=1e-4)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (
            {"kind": CategoricalSearch([4, 2], popsize=8, seed=1)},
            r"block 'kind' .*state's categories is \[3, 2\], but this search has \[4, 2\]",
        ),
        ({"x": CSANES([1.0, 2.0, 3.0], 0.5, popsize=8, seed=0)}, r"block 'x' .*mean has shape \(2,\), .* shape \(3,\)"),
        ({"x": PGPE([1.0, 2.0], 0.5, popsize=8, seed=0)}, r"block 'x' .*of strategy 'CSANES'"),
    ],
)
def test_the_state_of_other_blocks_is_refused_by_the_name_of_the_block(other, message):
    strategy = product(**other)
    before = copy.deepcopy(strategy.state_dict())
    with pytest.raises(sf.ScorefnError, match=message):
        strategy.load_state_dict(product().state_dict())
    assert same(before, strategy.state_dict())


@pytest.mark.parametrize(
    ("other", "named"),
    [
        ({"kind": CategoricalSearch([3, 2], margin=0.1, popsize=8, seed=1)}, r"\[\"blocks\['kind'\]\['margin'\]\"\]"),
        ({"kind": CategoricalSearch([3, 2], popsize=8, seed=2)}, r"\[\"blocks\['kind'\]\['generator'\]\"\]"),
        ({"x": CSANES([1.0, 3.0], 0.5, popsize=8, seed=0)}, r"\[\"blocks\['x'\]\['mean'\]\"\]"),
    ],
)
def test_a_checkpoint_of_other_blocks_names_the_block_and_the_setting(other, named, tmp_path):
    path = tmp_path / "run.pt"
    saved = Checkpoint(path)
    saved.resume(strategy := product(maxiter=3))
    run(strategy, cost, vectorized=True, callback=saved)
    written, fresh = path.read_bytes(), product(**other)
    before = copy.deepcopy(fresh.state_dict())
    with pytest.raises(sf.ScorefnError, match=f"differ at their start in {named}"):
        Checkpoint(path).resume(fresh)
    assert same(before, fresh.state_dict())
    assert path.read_bytes() == written
    again = product()
    assert Checkpoint(path).resume(again)
    assert same(strategy.state_dict(), again.state_dict())


def test_a_checkpoint_that_knows_whole_entries_only_is_read_and_refused_alike(tmp_path):
    saved = Checkpoint(tmp_path / "run.pt")
    saved.resume(strategy := product(maxiter=3))
    run(strategy, cost, vectorized=True, callback=saved)
    state = read_state(saved.path)
    write_atomically(saved.path, {**state, "start": {name: state["start"][name] for name in strategy.state_dict()}})
    assert Checkpoint(saved.path).resume(product())
    with pytest.raises(sf.ScorefnError, match=r"differ at their start in .*blocks\['kind'\]\['margin'\]"):
        Checkpoint(saved.path).resume(product(kind=CategoricalSearch([3, 2], margin=0.1, popsize=8, seed=1)))
    write_atomically(saved.path, {**state, "start": {**state["start"], "more": "0"}})
    with pytest.raises(sf.ScorefnError, match=r"differ at their start in \['more'\]"):
        Checkpoint(saved.path).resume(product())


def test_the_line_of_a_search_in_parts_shows_no_sigma():
    mixed, single = [], []
    result = run(product(maxiter=2), cost, vectorized=True, progress=mixed.append)
    run(CSANES([1.0], 0.5, seed=0, maxiter=2), lambda x: x.square().sum(), progress=single.append)
    assert mixed
    assert "nan" not in mixed[0]
    assert "sigma" not in mixed[0]
    assert "median" in mixed[0]
    assert "  sigma " in single[0]
    assert torch.as_tensor(result.history.sigma).isnan().all()
