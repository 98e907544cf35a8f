"""The digits application in miniature: what it calls exact is exact."""

import math

import torch

from applications.vi import digits


def test_the_pieces_fit_together():
    seen = []
    fitted = digits.fit(seed=0, steps=10, progress=seen.append, particles=2)
    assert [point.step for point in seen] == list(range(1, 11))
    assert fitted.train.shape == (1500, 64)
    result = digits.compare(fitted.net, fitted.test)
    assert 0 < result.gap < 5
    assert -64 * math.log(2) * 1.2 < result.log_evidence < 0
    rows = digits.gradient_table(fitted.net, fitted.train, particles=(2,), repeats=5, warm_up=1)
    assert all(0.1 < row.error < 4 for row in rows)
    assert rows[0].variance < rows[2].variance / 20
    assert digits.table(rows).count("\n") == len(rows) + 1


def test_probabilities_over_the_states_sum_to_one():
    torch.manual_seed(0)
    net = digits.BeliefNet(3)
    images = digits.load()[0][:3]
    torch.testing.assert_close(net.log_guide(images).logsumexp(-1), torch.zeros(3), atol=1e-5, rtol=0)
    posterior, guide = digits.marginals(net, images)
    weights = net.log_guide(images).detach().exp()
    torch.testing.assert_close(guide, weights @ digits.states())
    evidence = torch.stack([net.log_joint(image[None]).logsumexp(-1) for image in images]).squeeze(-1)
    torch.testing.assert_close(net.exact_bound(images) + kl(net, images), evidence)
    assert posterior.shape == (3, 10)


def kl(net, images):
    log_q, log_posterior = net.log_guide(images), net.log_joint(images).log_softmax(-1)
    return (log_q.exp() * (log_q - log_posterior)).sum(-1)
