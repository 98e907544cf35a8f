"""The skeletons of the page for contributors hold beyond what the page itself proves of them."""

import re
from pathlib import Path

import pytest
import torch
from mypy import api
from torch.distributions import Bernoulli, Normal

import scorefn as sf

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "contributing.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```$", PAGE, flags=re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def skeletons():
    names = {}
    for block in BLOCKS[:-1]:  # the last one proves, and the page is run as it is
        exec(block, names)
    return names


@pytest.mark.parametrize("batch", [(), (1,), (3,), (3, 2)])
def test_two_draws_have_the_exact_gradient_for_any_shape(skeletons, batch):
    logits = torch.linspace(-0.6, 0.8, torch.Size(batch).numel(), dtype=torch.float64).reshape(batch).requires_grad_()
    p, estimator = Bernoulli(logits=logits), skeletons["TwoDraws"]()
    for axes in range(len(batch) + 1):  # the trailing ones belong to one decision

        def f(x, axes=axes):
            return (x - 0.6).square().sum(tuple(range(x.ndim - axes, x.ndim))) if axes else (x - 0.6).square()

        assert estimator(p, f).shape == batch[: len(batch) - axes]
        if len(batch) < 2:  # the pairs of draws are few
            assert sf.diagnostics.assert_unbiased((p, f, estimator), params=logits).method == "exact"


@pytest.mark.parametrize(
    ("p", "n", "seen"), [(Normal(0.0, 1.0), 5, "asked for 5 of a Normal"), (Bernoulli(0.5), 4, "4 of a Bernoulli")]
)
def test_mirrored_refuses_what_has_no_pairs(skeletons, p, n, seen):
    with pytest.raises(sf.ScorefnError, match=seen):
        sf.expectation(p, lambda x: x, n, coupling=skeletons["Mirrored"]())


def test_a_credit_of_ones_own_is_named_with_what_it_holds(skeletons):
    assert repr(skeletons["Own"]()) == "Own()"

    class Weighted(skeletons["Own"]):
        def __init__(self, weights):
            self.weights, self._hidden = weights, 1

    assert repr(Weighted(torch.ones(2, 3))) == "Weighted(weights=tensor [2, 3])"


@pytest.mark.slow
def test_a_strict_type_checker_accepts_the_skeletons(tmp_path):
    (tmp_path / "skeletons.py").write_text("\n".join(BLOCKS), encoding="utf-8")
    said, wrong, status = api.run(["--config-file", str(ROOT / "pyproject.toml"), str(tmp_path / "skeletons.py")])
    assert status == 0, said + wrong
