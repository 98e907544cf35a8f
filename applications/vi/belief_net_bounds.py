"""How good a sigmoid belief net is: evidence, bound and marginals by summation, or bounds by sampling."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

import scorefn as sf
from applications.vi.belief_net import MOST_SUMMED, BeliefNet, states
from applications.vi.images import BATCH

EVALUATED = 10_000  # images at most, where the bound is estimated


@dataclass(frozen=True)
class Comparison:
    """The guide against the exact posterior, in nats per image; a marginal is P(z_k = 1 | x)."""

    log_evidence: float
    bound: float
    largest_marginal_difference: float
    mean_marginal_difference: float

    @property
    def gap(self) -> float:
        """KL(q || posterior): what the guide loses."""
        return self.log_evidence - self.bound

    def __str__(self) -> str:
        """In one line."""
        return (
            f"log evidence {self.log_evidence:8.3f}   bound {self.bound:8.3f}   gap {self.gap:.3f}   marginals differ "
            f"by {self.mean_marginal_difference:.4f} on average, {self.largest_marginal_difference:.3f} at most"
        )


@torch.no_grad()
def marginals(net: BeliefNet, images: Tensor) -> tuple[Tensor, Tensor]:
    """P(z_k = 1 | x) of the exact posterior and of the guide, both ``[images, K]``."""
    return net.log_joint_of_states(images).softmax(-1) @ states(net.latents), net.encoder(images).sigmoid()


@torch.no_grad()
def compare(net: BeliefNet, images: Tensor) -> Comparison:
    """By summing over all states of every image."""
    posterior, guide = marginals(net, images)
    difference = (posterior - guide).abs()
    return Comparison(
        net.log_joint_of_states(images).logsumexp(-1).mean().item(),
        net.exact_bound(images).mean().item(),
        difference.max().item(),
        difference.mean().item(),
    )


@dataclass(frozen=True)
class Estimate:
    """Bounds by sampling, in nats per image; an error is the standard error that the draws leave, the images given.

    Args:
        bound: the ELBO.
        error: of it.
        importance_weighted: the bound of ``draws`` particles, between ELBO and log evidence.
        importance_weighted_error: of it.
        draws: for each image.
        images: that were looked at.
    """

    bound: float
    error: float
    importance_weighted: float
    importance_weighted_error: float
    draws: int
    images: int

    def __str__(self) -> str:
        """In one line."""
        return (
            f"bound {self.bound:.3f} +- {self.error:.3f}   of {self.draws} particles {self.importance_weighted:.3f} +- "
            f"{self.importance_weighted_error:.3f}   {self.images} images"
        )


@torch.no_grad()
def estimate(net: BeliefNet, images: Tensor, draws: int = 100, *, seed: int = 0) -> Estimate:
    """By sampling, 100 images at a time; torch's global generator is left as it was.

    Args:
        net: whose bounds.
        images: ``[images, pixels]``, 0 or 1.
        draws: S for each image, 2 or more.
        seed: of the draws.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        weights = torch.cat([net.log_weights(some, draws) for some in images.split(BATCH)], -1)
    elbo, weighted = sf.posteriors.bound(weights), sf.posteriors.evidence(weights)

    def error(each: Tensor) -> float:
        return (each.square().sum().sqrt() / len(images)).item()

    return Estimate(
        elbo.value.mean().item(),
        error(elbo.standard_error),
        weighted.value.mean().item(),
        error(weighted.standard_error),
        draws,
        len(images),
    )


def evaluate(net: BeliefNet, images: Tensor, draws: int = 100) -> Comparison | Estimate:
    """Exactly where that is possible; otherwise on at most 10 000 images, the grey ones binarised by a fixed seed."""
    images = torch.bernoulli(images, generator=torch.Generator().manual_seed(1))  # 0 and 1 stay
    return compare(net, images) if net.latents <= MOST_SUMMED else estimate(net, images[:EVALUATED], draws)
