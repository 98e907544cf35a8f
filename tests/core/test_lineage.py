"""Which rule a subclass inherits, and why not."""

import pytest
import torch
from torch.distributions import Distribution, Independent, Normal, OneHotCategorical, OneHotCategoricalStraightThrough

import scorefn as sf
from scorefn.core import nearest, overridden
from scorefn.core.lineage import _SAME_DISTRIBUTION

DENSITY = ("log_prob", "support")


class Renamed(Normal):
    """Only a name."""


class Shown(Renamed):
    def __repr__(self):
        return "Shown"

    def sample(self, sample_shape=()):
        return super().sample(sample_shape)


class Folded(Shown):
    def log_prob(self, x):
        return super().log_prob(x.abs())


class FoldedAgain(Folded):
    """Inherits the override."""


class Bounded(Normal):
    """An attribute that is no method counts as well."""

    support = torch.distributions.constraints.positive


class Registered(Folded):
    """Has a rule of its own, below the override."""


class Sibling(Renamed):
    """Another child."""


class Mixed(Sibling, Folded):
    """Two parents: the order of method resolution decides, and has the grandparent last."""


class Bare(Distribution):
    """Of no known family; the methods of Distribution itself are overridden by every family."""


@pytest.mark.parametrize(
    ("cls", "known", "found"),
    [
        (Normal, [Normal], (Normal, "")),
        (Renamed, [Normal], (Normal, "")),
        (Shown, [Normal], (Normal, "")),
        (Shown, [Renamed, Normal], (Renamed, "")),
        (Folded, [Normal], (Folded, "log_prob")),
        (FoldedAgain, [Normal], (Folded, "log_prob")),
        (Bounded, [Normal], (Bounded, "support")),
        (Registered, [Registered, Normal], (Registered, "")),
        (Registered, [Normal], (Folded, "log_prob")),
        (Mixed, [Normal], (Folded, "log_prob")),
        (Mixed, [Renamed, Normal], (Folded, "log_prob")),
        (Mixed, [Sibling, Normal], (Sibling, "")),
        (Normal, [], (Normal, "log_prob")),
        (Bare, [Normal], (None, "")),
        (Distribution, [Normal], (None, "")),
        (Distribution, [Distribution], (Distribution, "")),
        (Bare, [Distribution], (Distribution, "")),
        (int, [Normal], (None, "")),
        (bool, [int], (int, "")),
    ],
)
def test_the_nearest_class_with_a_rule_or_an_override(cls, known, found):
    assert nearest(cls, known, DENSITY) == found
    assert nearest(cls, dict.fromkeys(known), DENSITY) == found


def test_the_first_method_that_is_asked_for_is_told():
    class Both(Normal):
        support = torch.distributions.constraints.positive

        def log_prob(self, x):
            return x

    assert nearest(Both, [Normal], ("support", "log_prob")) == (Both, "support")
    assert nearest(Both, [Normal], ("log_prob", "support")) == (Both, "log_prob")
    assert nearest(Both, [Normal], ("rsample",)) == (Normal, "")


def test_an_override_that_computes_the_same_is_passed_over():
    straight = OneHotCategoricalStraightThrough
    assert nearest(straight, [OneHotCategorical], ("rsample", "log_prob")) == (OneHotCategorical, "")

    class Own(straight):
        def rsample(self, sample_shape=()):
            return super().rsample(sample_shape)

    assert nearest(Own, [OneHotCategorical], ("rsample",)) == (Own, "rsample")


@pytest.mark.filterwarnings("ignore")  # of Pyro's own
@pytest.mark.parametrize("name", sorted(_SAME_DISTRIBUTION))
def test_what_is_passed_over_exists_and_has_a_family(name):
    module, _, cls = name.rpartition(".")
    found = getattr(pytest.importorskip(module), cls)
    assert issubclass(found, Distribution)
    assert f"{found.__module__}.{found.__qualname__}" == name
    assert any(parent.__module__.startswith("torch.distributions.") for parent in found.__mro__[1:-1])


@pytest.mark.parametrize("cls", [Normal, Renamed, Shown, Bare, Distribution, Independent, int])
def test_nothing_is_wrong_with_one_that_keeps_its_rule_or_has_none(cls):
    assert overridden(cls, [Normal], DENSITY, "entropy") == ""


@pytest.mark.parametrize(("cls", "by"), [(Folded, Folded), (FoldedAgain, Folded), (Mixed, Folded)])
def test_the_sentence_names_child_parent_method_and_rule(cls, by):
    assert overridden(cls, [Normal], DENSITY, "entropy") == (
        f"{cls.__name__} inherits from Normal, whose entropy is known, but {by.__name__} overrides log_prob, so that "
        "it may be another distribution, and that entropy silently wrong."
    )


def test_the_sentence_reaches_the_user():
    p = Folded(torch.zeros((), requires_grad=True), 1.0)
    with pytest.raises(sf.ScorefnError, match="Folded inherits from Normal, whose mean and covariance is known"):
        sf.DeltaMethod(p, lambda x: x)
