"""A sigmoid belief net: the model of binary images, its guide, and what of them is in closed form.

An image x of 0 and 1 has K Bernoulli latents, independent in the prior and in the guide::

    z_k ~ Bernoulli(sigmoid(prior_k));    x_i | z ~ Bernoulli(sigmoid(decoder(z)_i))
    q(z_k | x) = Bernoulli(sigmoid(encoder(x)_k))

With up to 12 latents every state of an image can be summed, so evidence, bound, posterior and gradient are exact.
``frozen(net, batch)`` is the guide and the black box of a net that is held still, for estimators to be compared on.
``discrete_vae.py`` is the program.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

import scorefn as sf

MOST_SUMMED = 12  # latents whose states are summed


@dataclass(frozen=True)
class Layers:
    """Hidden layers of encoder and decoder, and what stands between them."""

    encoder: tuple[int, ...] = ()
    decoder: tuple[int, ...] = ()
    activation: Callable[[], nn.Module] = nn.Tanh


NETS = {
    "mixed": Layers(encoder=(64,)),
    "linear": Layers(),
    # as in Dong, Mnih & Tucker (2020), "DisARM"
    "nonlinear": Layers((200, 200), (200, 200), lambda: nn.LeakyReLU(0.3)),
}


def network(sizes: tuple[int, ...], activation: Callable[[], nn.Module]) -> nn.Sequential:
    """Linear layers of these sizes, the activation between them."""
    layers: list[nn.Module] = []
    for narrow, wide in pairwise(sizes):
        layers += [nn.Linear(narrow, wide), activation()]
    return nn.Sequential(*layers[:-1])


class Generator(nn.Module):
    """p(z) p(x | z): a prior logit for each latent, and the decoder."""

    def __init__(self, latents: int, pixels: int, layers: Layers) -> None:
        super().__init__()
        self.prior = nn.Parameter(torch.zeros(latents))
        self.decoder = network((latents, *layers.decoder, pixels), layers.activation)


class BeliefNet(nn.Module):
    """The model and its guide, as Pyro programs and as densities, and what of them is in closed form.

    Args:
        num_images: that a minibatch stands for.
        latents: K.
        pixels: of an image.
        layers: of encoder and decoder.
    """

    def __init__(self, num_images: int, latents: int = 10, pixels: int = 64, layers: Layers = NETS["mixed"]) -> None:
        super().__init__()
        self.num_images = num_images
        self.latents = latents
        self.generator = Generator(latents, pixels, layers)
        self.encoder = network((pixels, *layers.encoder, latents), layers.activation)

    def model(self, images: Tensor) -> None:
        """Latents z and pixels x of a minibatch that stands for all images."""
        generator = pyro.module("generator", self.generator)
        with pyro.plate("images", self.num_images, subsample_size=len(images), dim=-1):
            z = pyro.sample("z", dist.Bernoulli(logits=generator.prior).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=generator.decoder(z)).to_event(1), obs=images)

    def guide(self, images: Tensor, infer: dict[str, Any] | None = None) -> None:
        """q(z | x), independent bits."""
        encoder = pyro.module("encoder", self.encoder)
        with pyro.plate("images", self.num_images, subsample_size=len(images), dim=-1):
            pyro.sample("z", dist.Bernoulli(logits=encoder(images)).to_event(1), infer=infer)

    def q(self, images: Tensor) -> torch.distributions.Bernoulli:
        """The guide as a torch distribution of batch shape ``[images, K]``."""
        return torch.distributions.Bernoulli(logits=self.encoder(images))

    def log_joint(self, images: Tensor, z: Tensor) -> Tensor:
        """log p(x, z), ``[N, images, K] -> [N, images]``."""
        pixels: Tensor = log_bernoulli(self.generator.decoder(z), images).sum(-1)
        return pixels + log_bernoulli(self.generator.prior, z).sum(-1)

    def log_weights(self, images: Tensor, num_samples: int) -> Tensor:
        """log p(x, z) - log q(z | x) of draws of the guide, ``[N, images]``."""
        q = self.q(images)
        z = q.sample(torch.Size((num_samples,)))
        log_q: Tensor = q.log_prob(z).sum(-1)
        return self.log_joint(images, z) - log_q

    def log_joint_of_states(self, images: Tensor) -> Tensor:
        """log p(x, z) of every state z, ``[images, 2^K]``."""
        z = states(self.latents).to(images)
        logits: Tensor = self.generator.decoder(z)
        prior = log_bernoulli(self.generator.prior, z).sum(-1)
        return images @ logits.T - nn.functional.softplus(logits).sum(-1) + prior

    def log_guide_of_states(self, images: Tensor) -> Tensor:
        """log q(z | x) of every state z, ``[images, 2^K]``."""
        logits: Tensor = self.encoder(images)
        return logits @ states(self.latents).to(images).T - nn.functional.softplus(logits).sum(-1, keepdim=True)

    def exact_bound(self, images: Tensor) -> Tensor:
        """The ELBO of each image by summing over all states, ``[images]``, differentiable."""
        log_q = self.log_guide_of_states(images)
        return (log_q.exp() * (self.log_joint_of_states(images) - log_q)).sum(-1)


def states(latents: int) -> Tensor:
    """All states of the latents, ``[2^K, K]``.

    Raises:
        sf.ScorefnError: they are too many.
    """
    if latents > MOST_SUMMED:
        raise sf.ScorefnError(
            f"{latents} latents have 2^{latents} states for each image, more than can be summed (2^{MOST_SUMMED} at "
            "most): estimate instead, or take fewer latents."
        )
    return torch.stack(torch.meshgrid([torch.tensor([0.0, 1.0])] * latents, indexing="ij"), -1).reshape(-1, latents)


def log_bernoulli(logits: Tensor, z: Tensor) -> Tensor:
    """Elementwise log-probability."""
    return z * logits - nn.functional.softplus(logits)


class Frozen(NamedTuple):
    """What an estimator of a gradient is given, for a minibatch.

    Attributes:
        q: Bernoulli of batch shape ``[images, K]``, whose logits ask for a gradient and belong to nothing else.
        f: the black box, log p(x, z) - log q(z | x), ``[N, images, K] -> [N, images]``: the gradient of E_q f in the
            logits is that of the ELBO. Nothing in it asks for a gradient, so its values have one only where z has; it
            takes z between 0 and 1 as well.
    """

    q: torch.distributions.Bernoulli
    f: Callable[[Tensor], Tensor]


def frozen(net: BeliefNet, images: Tensor) -> Frozen:
    """Guide and black box of a net as it is now: what moves the net or the logits later does not move f."""
    still = copy.deepcopy(net).requires_grad_(False)
    logits: Tensor = still.encoder(images)

    def f(z: Tensor) -> Tensor:
        return still.log_joint(images, z) - log_bernoulli(logits, z).sum(-1)

    return Frozen(torch.distributions.Bernoulli(logits=logits.clone().requires_grad_()), f)
