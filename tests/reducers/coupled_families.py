"""Couplings and families to draw by them."""

import torch
from torch import distributions as td

import scorefn as sf

COUPLED = {
    "Antithetic()": sf.Antithetic(),
    "Stratified()": sf.Stratified(),
    "Stratified(4)": sf.Stratified(4),
    "Systematic()": sf.Systematic(),
    "Sobol()": sf.Sobol(),
    "Sobol(4)": sf.Sobol(4),
    "OrthogonalGaussian()": sf.OrthogonalGaussian(),
    "OrthogonalGaussian(mirrored=True)": sf.OrthogonalGaussian(mirrored=True),
}
UNIFORMS = {name: coupling for name, coupling in COUPLED.items() if hasattr(coupling, "uniforms")}


def t(*values):
    return torch.tensor(values)


CHAIN = [td.AffineTransform(1.0, -2.0), td.ExpTransform(), td.AffineTransform(3.0, 0.5)]
TRIL = torch.tensor([[0.8, 0.0, 0.0], [0.3, 1.1, 0.0], [-0.4, 0.2, 0.6]])
CONTINUOUS = {
    "Normal": td.Normal(t(0.5, -2.0), t(0.1, 3.0)),
    "LogNormal": td.LogNormal(t(0.5), t(0.7)),
    "Uniform": td.Uniform(t(-1.0, 10.0), t(2.0, 11.0)),
    "Laplace": td.Laplace(0.5, 2.0),
    "Cauchy": td.Cauchy(0.5, t(2.0, 0.1)),
    "Exponential": td.Exponential(t(0.3, 7.0)),
    "Gumbel": td.Gumbel(0.5, 2.0),
    "logistic": td.TransformedDistribution(
        td.Uniform(t(0.0), t(1.0)), [td.SigmoidTransform().inv, td.AffineTransform(0.5, 2.0)]
    ),
    "chain": td.TransformedDistribution(td.Normal(t(0.2, 0.4), 0.5), CHAIN),
    "HalfNormal": td.HalfNormal(t(2.0)),
    "HalfCauchy": td.HalfCauchy(t(2.0)),
    "Weibull": td.Weibull(t(2.0), t(1.5)),
    "Pareto": td.Pareto(t(2.0), t(3.0)),
    "Kumaraswamy": td.Kumaraswamy(t(2.0), t(3.0)),
    "ContinuousBernoulli": td.ContinuousBernoulli(t(0.2)),
}
DISCRETE = {
    "Bernoulli": (td.Bernoulli(logits=t(0.5, -3.0)), 2),
    "Categorical": (td.Categorical(logits=torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0))), 5),
    "Categorical, impossible outcomes": (td.Categorical(probs=t(0.0, 0.3, 0.0, 0.7, 0.0)), 5),
    "Geometric": (td.Geometric(t(0.3, 0.9)), 30),
    "Geometric, certain": (td.Geometric(t(1.0)), 2),
    "Binomial": (td.Binomial(t(3.0, 40.0), t(0.3, 0.9)), 41),
    "Poisson": (td.Poisson(t(0.2, 3.7, 40.0)), 90),
    "Poisson, rate 0": (td.Poisson(t(0.0)), 2),
}
VECTORS = {
    "OneHotCategorical": td.OneHotCategorical(logits=torch.randn(2, 4, generator=torch.Generator().manual_seed(0))),
    "Independent(Normal)": td.Independent(td.Normal(torch.zeros(2, 3), 1.0), 1),
    "Independent(Bernoulli)": td.Independent(td.Bernoulli(logits=torch.zeros(2, 3)), 2),
    "Independent(OneHotCategorical)": td.Independent(td.OneHotCategorical(logits=torch.zeros(2, 3)), 1),
    "MultivariateNormal": td.MultivariateNormal(torch.zeros(2, 3), scale_tril=TRIL),
    "LowRankMultivariateNormal": td.LowRankMultivariateNormal(torch.ones(3), TRIL[:, :2], t(0.1, 0.2, 0.3)),
    "LogisticNormal": td.LogisticNormal(torch.zeros(2, 3), torch.ones(3)),
    "Mixture of Normals": td.MixtureSameFamily(
        td.Categorical(logits=torch.zeros(2, 3)), td.Normal(torch.zeros(2, 3), 1.0)
    ),
    "Mixture of vectors": td.MixtureSameFamily(
        td.Categorical(logits=torch.zeros(3)), td.Independent(td.Normal(torch.zeros(3, 4), 1.0), 1)
    ),
}
EVERY = {**CONTINUOUS, **{name: p for name, (p, _) in DISCRETE.items()}, **VECTORS}


def doubled(p):
    """The same distribution in float64."""
    if isinstance(p, td.Independent):
        return td.Independent(doubled(p.base_dist), p.reinterpreted_batch_ndims)
    if isinstance(p, td.MixtureSameFamily):
        return td.MixtureSameFamily(doubled(p.mixture_distribution), doubled(p.component_distribution))
    if type(p) is td.TransformedDistribution:
        return td.TransformedDistribution(doubled(p.base_dist), p.transforms)
    names = set(p.arg_constraints) - {"probs"} if "logits" in p.arg_constraints else set(p.arg_constraints)
    names -= {"covariance_matrix", "precision_matrix"}
    arguments = {name: getattr(p, name) for name in names}
    return type(p)(**{k: v.double() if isinstance(v, torch.Tensor) else v for k, v in arguments.items()})
