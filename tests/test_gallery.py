"""Figures of the gallery: exact numbers in them, small files beside the pages, bad names refused."""

import json
import re
from itertools import product
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

import scorefn as sf
from applications.gallery import __main__ as gallery
from applications.gallery import posterior, variance_bars
from applications.gallery.film import film, frame, write_film
from applications.vi.change_point import load

PAGES = Path(__file__).parents[1] / "docs" / "gallery"
STATES = torch.tensor(list(product((0.0, 1.0), repeat=variance_bars.COINS)), dtype=torch.float64)


def spread(weights, estimates):
    """Total variance of estimates ``[M, 3]`` with these probabilities."""
    mean = weights @ estimates
    return float(weights @ (estimates - mean).square().sum(1))


@pytest.mark.parametrize("p", [0.5, 0.07])
def test_the_bars_are_the_variances_of_the_formulas(p):
    found, f = variance_bars.variances(p), variance_bars.f(STATES)
    one = (STATES * p + (1 - STATES) * (1 - p)).prod(1)
    pairs, score = (one[:, None] * one).flatten(), STATES - p
    bare = (f[:, None, None] * score[:, None] + f[None, :, None] * score) / 2
    assert found["no baseline"] == pytest.approx(spread(pairs, bare.flatten(0, 1)), rel=1e-9)
    left_out = (f[:, None] - f)[..., None] * (STATES[:, None] - STATES) / 2
    assert found["leave-one-out"] == pytest.approx(spread(pairs, left_out.flatten(0, 1)), rel=1e-9)
    others = [variance_bars.f(STATES.index_fill(1, torch.tensor([j]), 1)) for j in range(3)]
    zeros = [variance_bars.f(STATES.index_fill(1, torch.tensor([j]), 0)) for j in range(3)]
    local = p * (1 - p) * (torch.stack(others, 1) - torch.stack(zeros, 1))
    assert found["LocalExpectation"] == pytest.approx(spread(one, local), rel=1e-9)
    if p == 0.5:  # a pair is a state and its complement
        pair = (f - variance_bars.f(1 - STATES))[:, None] * (2 * STATES - 1) / 4
        assert found["DisARM"] == pytest.approx(spread(one, pair), rel=1e-9)


def test_an_estimator_that_is_not_unbiased_has_no_bar(monkeypatch):
    biased = {"wrong": (2, lambda p, f: 1.5 * sf.expectation(p, f, 2))}
    monkeypatch.setattr(variance_bars, "ESTIMATORS", biased)
    with pytest.raises(RuntimeError, match=r"wrong at p = 0\.3"):
        variance_bars.variances(0.3)


def test_the_film_of_the_posterior_shows_the_guides_of_the_fit():
    change = load()
    points, guides = posterior.way(change, steps=6)
    assert [point.step for point in points] == [1, 2, 3, 4, 5, 6]
    for point, q in zip(points, guides, strict=True):
        assert float(q.sum()) == pytest.approx(1)
        assert point.others["total variation"] == float((q - change.posterior()).abs().sum()) / 2
    assert points[-1].gap < points[0].gap


def test_a_film_has_one_picture_for_each_state(tmp_path):
    figure = Figure(figsize=(1, 1), dpi=50)
    axis = figure.subplots()
    path = film(tmp_path / "a.gif", figure, lambda i: axis.plot([0, i], [0, 1]), 3, seconds=0.1, hold=1.0)
    with Image.open(path) as picture:
        durations = []
        for i in range(picture.n_frames):
            picture.seek(i)
            durations.append(picture.info["duration"])
        assert durations == [100, 100, 1000]
        assert picture.size == (50, 50)
    assert list(tmp_path.iterdir()) == [path]


def test_pictures_of_two_sizes_are_no_film(tmp_path):
    pictures = [frame(Figure(figsize=(1, 1), dpi=dpi)) for dpi in (50, 60)]
    with pytest.raises(ValueError, match=r"these 2 have the sizes \[\(50, 50\), \(60, 60\)\]"):
        write_film(tmp_path / "a.gif", pictures)
    with pytest.raises(ValueError, match=r"these 0 have the sizes \[\]"):
        write_film(tmp_path / "a.gif", [])
    assert not list(tmp_path.iterdir())


def drawn(out):
    path = out / "a.gif"
    path.write_bytes(b"GIF")
    return path


def test_the_program_draws_what_is_asked_for(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(gallery, "FIGURES", {"one": drawn, "two": lambda out: pytest.fail("not asked for")})
    assert gallery.main(["--only", "one", "one", "--out", str(tmp_path)]) == 0
    record = json.loads((tmp_path / "result.json").read_text(encoding="utf-8"))
    assert record["complete"]
    assert list(record["figures"]) == ["one"]
    assert record["figures"]["one"]["bytes"] == 3
    assert "one: " in capsys.readouterr().out


def test_a_large_picture_is_remarked_on(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(gallery, "FIGURES", {"one": drawn})
    monkeypatch.setattr(gallery, "LARGEST", 2)
    assert gallery.main(["--out", str(tmp_path)]) == 0
    assert "more than the 0 kB of a page" in capsys.readouterr().out


def test_ctrl_c_ends_after_the_present_figure(tmp_path, monkeypatch):
    monkeypatch.setattr(gallery, "FIGURES", {"one": drawn, "two": drawn})
    monkeypatch.setattr(gallery.Interruption, "__call__", lambda self: True)
    assert gallery.main(["--out", str(tmp_path)]) == 130
    record = json.loads((tmp_path / "result.json").read_text(encoding="utf-8"))
    assert not record["complete"]
    assert list(record["figures"]) == ["one"]


def test_an_unknown_figure_is_refused_by_name(tmp_path, capsys):
    with pytest.raises(SystemExit) as refused:
        gallery.main(["--only", "portrait", "--out", str(tmp_path / "none")])
    assert refused.value.code == 2
    assert "'portrait'" in (said := capsys.readouterr().err)
    assert "variance_bars" in said
    assert not (tmp_path / "none").exists()


def test_pictures_beside_the_pages_are_small_and_shown():
    shown = set()
    for page in PAGES.glob("*.md"):
        names = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", page.read_text(encoding="utf-8"))
        assert not [name for name in names if not (PAGES / name).exists()], page.name
        shown |= set(names)
    pictures = {path.name: path.stat().st_size for path in PAGES.iterdir() if path.suffix != ".md"}
    assert set(pictures) <= shown
    assert not {name: size for name, size in pictures.items() if size > gallery.LARGEST}
