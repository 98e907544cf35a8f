"""The survey: what it says is exact is."""

import pytest
import torch

import scorefn as sf
from applications.vi import survey


def test_survey_agrees_with_known_sums():
    found = survey.exact(survey.load())
    assert abs(found.log_evidence + 17.936146268) < 1e-9
    assert abs(found.expected_number - 187.2426) < 1e-4
    assert (found.mode, found.median) == (51, 149)
    assert abs(found.expected_theta - 0.195501) < 1e-6


def test_survey_log_ratio_does_not_depend_on_theta():
    net = survey.Survey(survey.load())
    assert len(net.numbers) == 474
    loss = sf.posteriors.ScoreFunctionELBO(50, max_plate_nesting=1)
    draws = loss.draws(net.model, net.guide)
    places = draws.x["place"].reshape(50)
    log_q = net.parameters.logits.log_softmax(-1)[places - net.impossible]
    expected = net.log_joint(places + 1) - log_q
    torch.testing.assert_close(draws.fx.sum(-1), expected, rtol=1e-9, atol=1e-9)


def test_survey_best_guide_has_no_noise_left():
    net = survey.Survey(survey.load())
    with torch.no_grad():
        net.parameters.logits.copy_(net.log_joint(net.numbers))
    assert abs(net.exact_bound().item() - survey.exact(net.returns).log_evidence) < 1e-12
    net.plain_bound(4).backward()
    assert net.parameters.logits.grad.abs().max() < 1e-12


@pytest.mark.parametrize("way", survey.WAYS)
def test_survey_fits_every_way(way):
    fitted = survey.fit(0, 30, way=way, learning_rate=0.1)
    assert fitted.curve[-1].gap > 0
    if way in (survey.OURS, survey.PLAIN, "exact gradient"):
        assert fitted.curve[-1].gap < fitted.curve[0].gap


def test_survey_refuses_another_way():
    with pytest.raises(ValueError, match="way must be one of 'ScoreFunctionELBO'.*, but it is 'newton'"):
        survey.fit(way="newton")
