"""What the support check follows: chains inside chains, modules that are transforms, supports that are not declared."""

import pytest
import torch
import torch.distributions as td
from torch import nn
from torch.distributions import transforms as tr

import scorefn as sf
from scorefn.core import check_support


def theta(value=1.0):
    return torch.tensor(value, requires_grad=True)


def refused(p):
    with pytest.raises(sf.SupportError):
        sf.expectation(p, lambda x: x.flatten(1).sum(-1) if x.ndim > 1 else x, 4)
    return True


def test_what_follows_a_chain_inside_a_chain_is_seen():
    chain = [tr.ComposeTransform([tr.ExpTransform()]), tr.AffineTransform(theta(), 1.0)]
    assert refused(td.TransformedDistribution(td.Normal(0.0, 1.0), chain))


class Shift(nn.Module, tr.Transform):
    """A transform whose parameter stands in a module, out of reach of `vars`."""

    domain = codomain = td.constraints.real
    bijective = True

    def __init__(self):
        nn.Module.__init__(self)
        tr.Transform.__init__(self)
        self.shift = nn.Parameter(torch.ones(()))

    __hash__ = nn.Module.__hash__

    def __eq__(self, other):
        return self is other

    def __call__(self, x):
        return x + self.shift


def test_the_parameters_of_a_transform_that_is_a_module_are_seen():
    p = td.TransformedDistribution(td.Uniform(0.0, 1.0), [Shift()])
    assert refused(p)
    p.transforms[0].requires_grad_(False)
    with torch.no_grad():
        assert p.sample((4,)).min() >= 1


def test_a_power_moves_the_ends_that_are_neither_zero_nor_one():
    def powered(low, high):
        base = td.Uniform(torch.tensor(low), torch.tensor(high))
        return td.TransformedDistribution(base, [tr.PowerTransform(theta(2.0))])

    assert refused(powered([0.0, 0.5], [1.0, 1.0]))
    value = sf.expectation(powered([0.0, 0.0], [1.0, 1.0]), lambda x: x.sum(-1), 4)
    assert value.requires_grad


class Undeclared(td.Distribution):
    """A normal distribution that says nothing of its support."""

    arg_constraints = {}

    def __init__(self, loc):
        self.normal = td.Normal(loc, 1.0)
        super().__init__(validate_args=False)

    def sample(self, sample_shape=()):
        return self.normal.sample(sample_shape)

    def log_prob(self, x):
        return self.normal.log_prob(x)


def test_a_distribution_that_declares_no_support_is_accepted():
    loc = theta()
    sf.expectation(Undeclared(loc), lambda x: x, 4).backward()
    assert loc.grad.isfinite()


class Declared(Undeclared):
    """One whose class says that it lives on the whole line, whatever it is made of."""

    support = td.constraints.real

    def __init__(self, loc):
        super().__init__(loc)
        self.base_dist = td.Uniform(loc - 1, loc + 1)


def test_a_class_is_taken_at_its_word():
    loc = theta()
    sf.expectation(Declared(loc), lambda x: x, 4).backward()
    assert loc.grad.isfinite()


class Held(Undeclared):
    """One whose class holds the end of its support, and that end is learnt."""

    end = theta()
    support = td.constraints.greater_than(end)


class HeldDeeper(Undeclared):
    """The same, inside another constraint."""

    support = td.constraints.independent(td.constraints.interval(0.0, Held.end), 0)


class Fixed(Undeclared):
    """An end that is a tensor, and stays where it is."""

    support = td.constraints.greater_than(Held.end.detach())


@pytest.mark.parametrize("family", [Held, HeldDeeper])
def test_a_support_that_a_class_holds_may_not_move_either(family):
    p = family(0.0)
    assert refused(p)
    assert refused(td.TransformedDistribution(p, [tr.ExpTransform()]))
    with torch.no_grad():
        sf.expectation(p, lambda x: x, 4)
    loc = theta()
    sf.expectation(Fixed(loc), lambda x: x, 4).backward()
    assert loc.grad.isfinite()


class HeldByOne(Undeclared):
    """One whose class says that it lives on the whole line, and each of which says otherwise."""

    support = td.constraints.real

    def __init__(self, end):
        super().__init__(0.0)
        self.support = td.constraints.greater_than(end)


def test_a_support_that_an_instance_puts_over_its_class_may_not_move():
    assert refused(HeldByOne(theta()))
    assert refused(td.Independent(HeldByOne(theta([1.0])), 0))
    check_support(HeldByOne(theta().detach()))


class Measured:
    """A measure that is no torch distribution, with a support that moves."""

    support = Held.support

    def sample(self, sample_shape=()):
        return torch.ones(sample_shape)

    def log_prob(self, x):
        return x * Held.end


def test_what_a_measure_of_ones_own_declares_counts_as_well():
    assert refused(Measured())


class Line(Undeclared):
    """One whose support is an interval without ends."""

    support = td.constraints.interval(-torch.inf, torch.inf)


@pytest.mark.parametrize("base", [td.Normal(0.0, 1.0), Line(0.0)])
def test_an_interval_without_ends_is_the_line(base):
    """|x| lives on the half-line, which a factor leaves as it is and a shift moves."""
    check_support(td.TransformedDistribution(base, [tr.AbsTransform(), tr.AffineTransform(0.0, theta())]))
    with pytest.raises(sf.SupportError):
        check_support(td.TransformedDistribution(base, [tr.AbsTransform(), tr.AffineTransform(theta(), 1.0)]))
