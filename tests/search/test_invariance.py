"""What the search must not see: the scale of f, the origin, the units, the order of coordinates and points."""

import pytest
import torch

from scorefn.search import SNES

GENERATIONS = 120
CURVATURE = torch.logspace(0, 3, 6, dtype=torch.float64)


def valley(x):
    """Ill-scaled, multimodal in one coordinate, with its minimum at 1."""
    return (CURVATURE * (x - 1).square()).sum(-1) + 3 * torch.sin(5 * x[..., 0])


def path(f, x0, sigma0, generations=GENERATIONS):
    strategy = SNES(x0, sigma0, seed=11)
    means, sigmas = [], []
    for _ in range(generations):
        x = strategy.ask()
        strategy.tell(x, f(x))
        means.append(strategy.result.mean)
        sigmas.append(strategy.result.sigma)
    return torch.stack(means), torch.stack(sigmas)


START = torch.linspace(-2, 3, 6, dtype=torch.float64)


@pytest.mark.parametrize(
    "transform",
    [
        lambda f: 8 * f - 3,
        lambda f: f**3,
        lambda f: torch.log(f + 20),
        lambda f: -1 / (f + 20),
        lambda f: torch.where(f > 1, f + 1e6, f),
    ],
    ids=["affine", "cube", "log", "reciprocal", "jump"],
)
def test_strictly_monotone_transforms_of_f_change_nothing(transform):
    plain, transformed = path(valley, START, 0.7), path(lambda x: transform(valley(x)), START, 0.7)
    assert all(map(torch.equal, plain, transformed))
    assert (plain[0][-1] - START).abs().max() > 0.5


def test_the_origin_does_not_matter():
    shift = torch.tensor([4.0, -8.0, 0.5, 16.0, -1.0, 2.0], dtype=torch.float64)
    plain, moved = path(valley, START, 0.7), path(lambda x: valley(x - shift), START + shift, 0.7)
    torch.testing.assert_close(moved[0] - shift, plain[0], rtol=0, atol=1e-9)
    torch.testing.assert_close(moved[1], plain[1], rtol=1e-9, atol=0)


@pytest.mark.parametrize("unit", [2.0**-20, 1000.0])
def test_the_unit_of_each_coordinate_does_not_matter(unit):
    units = torch.tensor([unit, 1.0, 3.0, unit, 0.1, 1.0], dtype=torch.float64)
    plain, scaled = path(valley, START, 0.7), path(lambda x: valley(x / units), START * units, 0.7 * units)
    torch.testing.assert_close(scaled[0] / units, plain[0], rtol=1e-8, atol=1e-9)
    torch.testing.assert_close(scaled[1] / units, plain[1], rtol=1e-8, atol=0)


def test_the_order_of_the_coordinates_does_not_matter():
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    strategy, permuted = SNES(START, 0.7, seed=2), SNES(START[order], 0.7, seed=2)
    for _ in range(GENERATIONS):
        x = strategy.ask()
        f = valley(x)
        strategy.tell(x, f)
        permuted.tell(x[:, order], f)
    torch.testing.assert_close(permuted.result.mean, strategy.result.mean[order], rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(permuted.result.sigma, strategy.result.sigma[order], rtol=1e-10, atol=0)


def test_the_order_of_the_points_does_not_matter_even_with_ties():
    strategy, shuffled = SNES(START, 0.7, seed=2), SNES(START, 0.7, seed=2)
    generator = torch.Generator().manual_seed(0)
    for _ in range(GENERATIONS):
        x = strategy.ask()
        f = (valley(x) / 20).round()  # ties in most generations
        order = torch.randperm(len(x), generator=generator)
        strategy.tell(x, f)
        shuffled.tell(x[order], f[order])
    torch.testing.assert_close(shuffled.result.mean, strategy.result.mean, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(shuffled.result.sigma, strategy.result.sigma, rtol=1e-8, atol=0)
