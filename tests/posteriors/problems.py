"""Tiny models with guides, each with one thing that a credit can get wrong."""

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine

from tests.posteriors.enumeration import Problem


def parameters(*sizes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(size, generator=generator, dtype=torch.float64).requires_grad_() for size in sizes]


def number(value):
    return torch.tensor(value, dtype=torch.float64)


def observe(name, loc, value):
    pyro.sample(name, dist.Normal(loc, number(1.0)), obs=number(value))


def coin(name, logits, **infer):
    return pyro.sample(name, dist.Bernoulli(logits=logits), **infer)


def single():
    logit, weight = parameters((), ())

    def model():
        observe("x", weight * coin("z", number(-0.8)), 0.7)

    def guide():
        coin("z", logit)

    return Problem("one coin", [logit, weight], model, guide)


def categorical():
    logits, weights = parameters(3, 3)

    def model():
        z = pyro.sample("z", dist.Categorical(logits=weights))
        observe("x", weights[z.long()].square(), 0.7)

    def guide():
        pyro.sample("z", dist.Categorical(logits=logits))

    return Problem("categorical", [logits, weights], model, guide)


def branch():
    logit, inner, weight = parameters((), 2, (), seed=1)

    def model():
        if coin("z", number(0.4)):
            y = coin("y", weight)
            observe("x", 2.0 if y else -1.0 + 0.0 * weight, 0.7)
        else:
            w = coin("w", number(-1.0))
            observe("x", weight * w, 0.7)

    def guide():
        if coin("z", logit):
            coin("y", inner[0])
        else:
            coin("w", inner[1])

    return Problem("control flow", [logit, inner, weight], model, guide, batched=False)


def leak():
    """log p(x) depends on z through Python's bool only."""
    logit, weight = parameters((), ())

    def model():
        z = coin("z", number(-0.5))
        observe("x", weight if z else -weight, 0.9)

    def guide():
        coin("z", logit)

    return Problem("if z", [logit, weight], model, guide, batched=False)


def plate():
    top, slopes, weight = parameters((), 3, ())
    data = number([0.3, -1.0, 1.4])

    def model():
        g = coin("g", number(0.3))
        with pyro.plate("data", 3):
            z = coin("z", weight * g - 0.2)
            pyro.sample("x", dist.Normal(z + weight * g, 1.0), obs=data)

    def guide():
        g = coin("g", top)
        with pyro.plate("data", 3):
            coin("z", slopes + g)

    return Problem("global and plate", [top, slopes, weight], model, guide, nesting=1)


def local_first():
    """The global site is sampled after the plate, and depends on all of it; then the plate again."""
    top, slopes, weight = parameters((), 2, (), seed=2)
    data = number([0.3, -1.0])

    def model():
        data_plate = pyro.plate("data", 2)
        with data_plate:
            z = coin("z", number(0.3))
        s = coin("s", 2 * z.sum(-1, keepdim=True) - 2 if z.ndim > 1 else 2 * z.sum() - 2)
        with data_plate:
            pyro.sample("x", dist.Normal(weight * s + z, 1.0), obs=data)

    def guide():
        data_plate = pyro.plate("data", 2)
        with data_plate:
            z = coin("z", slopes)
        s = coin("s", top + (z.sum(-1, keepdim=True) if z.ndim > 1 else z.sum()))
        with data_plate:
            coin("late", slopes * s - 1.0, infer={"is_auxiliary": True})

    return Problem("carrier between two entries of a plate", [top, slopes, weight], model, guide, nesting=1)


def nested():
    top, outer, inner = parameters((), 2, (2, 2), seed=3)
    data = number([[0.3, -1.0], [1.4, 0.2]])

    def model():
        g = coin("g", number(0.3))
        with pyro.plate("outer", 2, dim=-1):
            u = coin("u", g - 0.5)
            with pyro.plate("inner", 2, dim=-2):
                v = coin("v", u + 0.3 * g)
                pyro.sample("x", dist.Normal(v + u * g, 1.0), obs=data)

    def guide():
        g = coin("g", top)
        with pyro.plate("outer", 2, dim=-1):
            u = coin("u", outer + g)
            with pyro.plate("inner", 2, dim=-2):
                coin("v", inner - u)

    return Problem("nested plates", [top, outer, inner], model, guide, nesting=2)


def nested_small():
    """As nested, but with few enough bits for pairs of particles."""
    outer, inner = parameters(2, (2, 1), seed=3)
    data = number([[0.3, -1.0], [1.4, 0.2]])

    def model():
        with pyro.plate("outer", 2, dim=-1):
            u = coin("u", number(-0.5))
            with pyro.plate("rows", 1, dim=-2):
                v = coin("v", u)
            with pyro.plate("inner", 2, dim=-2):
                pyro.sample("x", dist.Normal(v + u, 1.0), obs=data)

    def guide():
        with pyro.plate("outer", 2, dim=-1):
            u = coin("u", outer)
            with pyro.plate("rows", 1, dim=-2):
                coin("v", inner[:, 0] - u)

    return Problem("nested plates, two at one depth", [outer, inner], model, guide, nesting=2)


def crossed():
    """Two plates side by side, the second depends on the first, and a table inside both."""
    rows, columns, weight = parameters(2, 2, (), seed=4)
    data = number([[0.3, -1.0], [1.4, 0.2]])

    def model():
        a, b = pyro.plate("rows", 2, dim=-2), pyro.plate("columns", 2, dim=-1)
        with a:
            u = coin("u", number(-0.5))
        with b:
            v = coin("v", weight)
        with a, b:
            pyro.sample("x", dist.Normal(u * v + weight * v, 1.0), obs=data)

    def guide():
        with pyro.plate("rows", 2, dim=-2):
            u = coin("u", rows[:, None])
        with pyro.plate("columns", 2, dim=-1):
            coin("v", columns + u.sum(-2, keepdim=True))

    return Problem("crossed plates", [rows, columns, weight], model, guide, nesting=2)


def subsampled():
    top, slopes = parameters((), 6, seed=5)
    data = number([0.3, -1.0, 1.4, 0.0, 2.0, -0.5])
    index = torch.tensor([0, 3])

    def model():
        g = coin("g", number(0.3))
        with pyro.plate("data", 6, subsample=index):
            z = coin("z", g - 0.2)
            pyro.sample("x", dist.Normal(z + g, 1.0), obs=data[index])

    def guide():
        g = coin("g", top)
        with pyro.plate("data", 6, subsample=index):
            coin("z", slopes[index] + g)

    return Problem("subsampled plate", [top, slopes], model, guide, nesting=1)


def masked():
    """A masked decision costs nothing itself, but what it influences does."""
    top, slopes = parameters((), 2, seed=6)
    mask = torch.tensor([True, False])

    def model():
        with pyro.plate("data", 2):
            with poutine.mask(mask=mask):
                z = coin("z", number(0.4))
            pyro.sample("x", dist.Normal(z, 1.0), obs=number([0.3, 1.4]))

    def guide():
        coin("a", top, infer={"is_auxiliary": True})
        with pyro.plate("data", 2), poutine.mask(mask=mask):
            coin("z", slopes + top)

    return Problem("masked, with an auxiliary coin", [top, slopes], model, guide, nesting=1)


def auxiliary():
    """The latent's guide depends on a coin that the model does not know."""
    top, slopes = parameters((), 2, seed=7)

    def model():
        observe("x", 2 * coin("z", number(0.4)), 1.2)

    def guide():
        a = coin("a", top, infer={"is_auxiliary": True})
        coin("z", slopes[0] + slopes[1] * a)

    return Problem("auxiliary site", [top, slopes], model, guide)


def mixed():
    """Reparameterised before and after a coin, at fixed noise."""
    loc, scale, top, weight = parameters((), (), 2, (), seed=8)

    def model():
        w = pyro.sample("w", dist.Normal(number(0.0), 1.0))
        z = coin("z", w)
        y = pyro.sample("y", dist.Normal(z, 1.0))
        observe("x", weight * y * z + w, 1.2)

    def guide():
        w = pyro.sample("w", dist.Normal(loc, scale.exp()))
        z = coin("z", top[0] + w)
        pyro.sample("y", dist.Normal(loc * z + top[1] * w, scale.exp()))

    return Problem("reparameterised and not", [loc, scale, top, weight], model, guide)


def swapped():
    """The guide samples b first and a given b; the model meets a first, so log p(a) depends on b."""
    first, second = parameters((), 2, seed=9)

    def model():
        a = coin("a", number(1.5))
        b = coin("b", 2 * a - 1)
        observe("x", a - b, 0.4)

    def guide():
        b = coin("b", first)
        coin("a", second[0] + 3 * second[1] * b)

    return Problem("guide and model in opposite order", [first, second], model, guide)


def foreign():
    """Latents under another plate in the model than in the guide: any of them may reach any datum."""
    slopes, weight = parameters(2, (), seed=10)

    def model():
        with pyro.plate("latents", 2):
            z = coin("z", weight)
        with pyro.plate("data", 2):
            pyro.sample("x", dist.Normal(z.sum(-1, keepdim=True), 1.0), obs=number([0.4, 1.0]))

    def guide():
        with pyro.plate("data", 2):
            coin("z", slopes)

    return Problem("other plates in the model", [slopes, weight], model, guide, nesting=1)


def event():
    """One decision of two bits in each element of a plate."""
    slopes, weight = parameters((2, 2), 2, seed=11)

    def model():
        with pyro.plate("data", 2):
            z = pyro.sample("z", dist.Bernoulli(logits=weight).to_event(1))
            pyro.sample("x", dist.Normal((z * weight).sum(-1), 1.0), obs=number([0.4, 1.0]))

    def guide():
        with pyro.plate("data", 2):
            pyro.sample("z", dist.Bernoulli(logits=slopes).to_event(1))

    return Problem("two bits an element", [slopes, weight], model, guide, nesting=1)


SMALL = [
    single,
    categorical,
    branch,
    leak,
    plate,
    local_first,
    nested_small,
    crossed,
    subsampled,
    masked,
    auxiliary,
    mixed,
    swapped,
    foreign,
    event,
]
ALL = [*SMALL, nested]
