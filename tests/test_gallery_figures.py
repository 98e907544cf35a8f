"""Figures of policies and searches: each runs with a tiny setting, and the exact numbers in them are exact."""

import math
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

import scorefn as sf
from applications.gallery import curves, policies, search_paths
from applications.gallery.film import write_film
from applications.rl import evaluation, inventory
from applications.rl.contextual_bandit import Config
from applications.rl.exact_gridworld import Gridworld, Problem
from applications.rl.settings import settings_for

SMALL = Gridworld(horizon=3)


def frames(path):
    with Image.open(path) as picture:
        return picture.n_frames


def test_what_stands_still_costs_nothing_in_a_film(tmp_path):
    still = Image.effect_noise((80, 80), 60).convert("RGB")
    moving = []
    for i in range(12):
        moving.append(still.copy())
        moving[-1].paste((255, 0, 0), (5 * i, 0, 5 * i + 4, 4))
    one = write_film(tmp_path / "one.gif", moving[:1]).stat().st_size
    assert write_film(tmp_path / "all.gif", moving).stat().st_size < 2 * one
    with Image.open(tmp_path / "all.gif") as picture:
        first = picture.convert("RGB").getpixel((60, 60))
        picture.seek(11)
        assert picture.convert("RGB").getpixel((60, 60)) == first


# -------------------------------------------------------------------------------------------------------- search paths


def test_the_ellipse_is_a_level_of_the_search_density():
    factor = torch.tensor([[1.0, 0.5], [0.2, 2.0]], dtype=torch.float64)
    mean = torch.tensor([0.3, -0.7], dtype=torch.float64)
    outline = search_paths.ellipse(search_paths.Generation(0, mean, factor, mean[None], 0.0), deviations=2.0)
    inverse = torch.linalg.inv(factor @ factor.T)
    distance = ((outline - mean) @ inverse * (outline - mean)).sum(1)
    assert distance == pytest.approx(4.0)


@pytest.mark.parametrize("kind", [sf.search.SNES, sf.search.XNES])
def test_a_way_has_the_strategys_mean_and_standard_deviations(kind):
    seen = []

    def f(x):
        if x.ndim == 2:
            seen.append(x)
        return search_paths.rotated_ellipsoid(x)

    strategy = kind([-1.0, 0.5], 0.5, popsize=6, seed=0)
    states = search_paths.way(strategy, f, 4)
    assert [state.evaluations for state in states] == [0, 6, 12, 18]
    assert [state.value for state in states] == [float(f(state.mean)) for state in states]
    assert all(torch.equal(state.points, x) for state, x in zip(states, seen, strict=True))
    assert states[0].factor == pytest.approx(0.5 * torch.eye(2, dtype=torch.float64))
    assert (states[-1].factor.count_nonzero() == 2) == (kind is sf.search.SNES)


def test_a_way_ends_where_the_search_does():
    states = search_paths.way(sf.search.CSANES([1.0, 1.0], 0.1, seed=0, maxiter=3), search_paths.rosenbrock, 50)
    assert len(states) == 3


def test_the_landscapes_are_what_they_are_called():
    assert search_paths.rosenbrock(torch.tensor([[1.0, 1.0], [-1.2, 1.0]])).tolist() == pytest.approx([0.0, 24.2])
    angle = math.radians(40)
    long = torch.tensor([math.cos(angle), math.sin(angle)], dtype=torch.float64)
    short = torch.tensor([-math.sin(angle), math.cos(angle)], dtype=torch.float64)
    assert search_paths.rotated_ellipsoid(torch.stack([long, short])).tolist() == pytest.approx([1.0, 1000.0])


def test_films_of_searches(tmp_path):
    assert frames(search_paths.draw_rosenbrock(tmp_path, generations=2)) == 2
    assert frames(search_paths.draw_rotated_ellipsoid(tmp_path, generations=2)) == 2


# ------------------------------------------------------------------------------------------------------------ policies


def test_the_gridworlds_value_is_that_of_backward_induction():
    problem = Problem(SMALL)
    steps = policies.learn(SMALL, updates=3, seed=1)
    for step in steps:
        exact = problem.values(step.policy.log())[SMALL.start]
        assert step.value == pytest.approx(float(exact), abs=1e-12)
    assert steps[0].policy == pytest.approx(torch.full_like(steps[0].policy, 0.25))
    assert len({step.value for step in steps}) == 4


def test_no_policy_is_better_than_the_best():
    world = Gridworld(("S.G",), slip=0.2, horizon=2)  # to the right, twice
    assert policies.best_value(world, 0.9) == pytest.approx(0.9 * 0.8**2)
    best = policies.best_value(SMALL, 0.9)
    size = len(SMALL.cells)
    logits = 4 * torch.randn(30, size, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    problem = Problem(SMALL)
    assert max(float(problem.values(row)[SMALL.start]) for row in logits) <= best


def test_an_episode_of_each_stage_starts_in_the_same_state():
    shown = policies.episodes(seed=0, snapshots=(0, 1), max_updates=2)
    assert list(shown) == ["untrained", "1 updates", "2 updates, the end"]
    first = [states[0] for states in shown.values()]
    assert all(torch.equal(state, first[0]) for state in first)
    assert all(states.shape[1] == 4 and len(states) <= 500 for states in shown.values())


def test_films_of_policies(tmp_path):
    path = policies.draw_cartpole(tmp_path, snapshots=(0,), max_updates=1, every=100)
    assert frames(path) >= 1
    assert frames(policies.draw_gridworld(tmp_path, updates=3, world=SMALL, every=2)) == 3


def test_the_shops_figure(tmp_path):
    path = policies.draw_inventory(tmp_path, updates=1, shop=inventory.Shop(horizon=2))
    assert path.stat().st_size > 0


# -------------------------------------------------------------------------------------------------------------- curves


def test_curves_of_programs(tmp_path, capsys):
    names = [
        curves.draw_programs(tmp_path, updates=1),
        curves.draw_bandit(tmp_path, Config(contexts=4, updates=1, repeats=2, measured_at=(1,))),
        curves.draw_mistakes(tmp_path, seeds=1),
    ]
    assert [path.name for path in names] == ["reinforce_to_ppo.png", "contextual_bandit.png", "fewest_mistakes.png"]
    assert capsys.readouterr().out == ""


class Countdown:
    """An environment that is over after some steps."""

    def __init__(self, steps):
        self.left = self.steps = steps

    def reset(self, seed):
        return torch.zeros(2).numpy(), {}

    def render(self):
        return torch.full((40, 60, 3), 5 * self.left, dtype=torch.uint8).numpy()

    def step(self, action):
        self.left -= 1
        return torch.zeros(2).numpy(), 1.0, self.left == 0, False, {}

    def close(self):
        pass


@pytest.mark.parametrize(("steps", "shown"), [(7, 3), (50, 4)])
def test_a_film_of_an_episode_shows_every_third_step(tmp_path, monkeypatch, steps, shown):
    monkeypatch.setattr(evaluation.gymnasium, "make", lambda name, render_mode: Countdown(steps))
    policy = sf.trajectories.CategoricalPolicy(torch.nn.Linear(2, 2))
    training = SimpleNamespace(settings=settings_for("CartPole-v1"), seed=0, policy=policy)
    evaluation.record(training, tmp_path / "episode.gif", frames=12)
    with Image.open(tmp_path / "episode.gif") as picture:
        assert picture.n_frames == shown
        assert picture.size == (30, 20)
        assert picture.info["duration"] == 60
