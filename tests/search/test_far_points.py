"""Told points farther away than any draw are pulled back, or refused where they cannot be; none is lost."""

import pytest
import torch

import scorefn as sf
from scorefn.search import CSANES, PGPE, SNES, XNES, ClipUp, OpenAIES, RankOneCSANES, SeparableCSANES


def kinds():
    for kind in (CSANES, RankOneCSANES, SeparableCSANES, XNES, PGPE):
        yield pytest.param(lambda kind=kind: kind([0.0] * 4, 1.0, popsize=8, seed=0), id=kind.__name__)
    yield pytest.param(
        lambda: OpenAIES([0.0] * 4, 1.0, popsize=8, seed=0, optimizer=lambda p: ClipUp(p, 0.1)), id="OpenAIES"
    )
    for kind in (RankOneCSANES, SeparableCSANES, PGPE):
        yield pytest.param(
            lambda kind=kind: kind([0.0] * 4, 1.0, popsize=8, seed=0, dtype=torch.float32),
            id=f"{kind.__name__} float32",
        )


def after(make, distance):
    strategy = make()
    x = strategy.ask()
    if x.dtype == torch.float32:
        distance = min(distance, 1e37)
    x[3] = (torch.tensor([1.0, -2.0, 0.5, 0.0], dtype=torch.float64) * distance).to(x.dtype)
    strategy.tell(x, (torch.arange(8) - 3).abs().double())
    return strategy.mean, strategy.sigma


@pytest.mark.parametrize("make", list(kinds()))
@pytest.mark.parametrize("distance", [1e10, 1e37, 1e140, 1e160, 1e300])
def test_a_point_pulled_back_teaches_its_direction_whatever_its_distance(make, distance):
    near, far = after(make, 1e4), after(make, distance)
    for one, other in zip(near, far, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-6, atol=1e-9)
    assert float(far[0] @ torch.tensor([1.0, -2.0, 0.5, 0.0], dtype=torch.float64)) > 0


@pytest.mark.parametrize("rank", [0, 3, 7])
@pytest.mark.parametrize("distance", [1e10, 1e160, 1e300])
def test_snes_refuses_what_would_overflow(distance, rank):
    strategy = SNES([0.0] * 4, 1.0, popsize=8, seed=0)
    x = strategy.ask()
    x[rank] = distance
    before = strategy.state_dict()
    with pytest.raises(sf.NonFiniteError, match="too many standard deviations away"):
        strategy.tell(x, range(8))
    assert torch.equal(before["location"], strategy.mean)


def test_a_point_beyond_all_local_coordinates_is_refused():
    strategy = CSANES([0.0] * 4, 1e-100, popsize=8, seed=0)
    x = strategy.ask()
    x[0] = 1e300
    with pytest.raises(sf.NonFiniteError):
        strategy.tell(x, range(8))
    assert torch.equal(strategy.mean, torch.zeros(4, dtype=torch.float64))
