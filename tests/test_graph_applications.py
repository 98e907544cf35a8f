"""The programs of ``applications/graphs``: what they call exact is, their graphs agree with it, and all of them run."""

import itertools
import json

import pytest
import torch
from torch.distributions import Categorical

import scorefn as sf
from applications.graphs import hard_attention, latent_options, sigmoid_belief_net
from applications.graphs.hard_attention import Digits, Reader
from applications.graphs.latent_options import Policy, Walk
from applications.graphs.sigmoid_belief_net import TwoLayers
from applications.vi.belief_net import log_bernoulli, states
from tests.graph.choices import CHOOSER, Coin

PROGRAMS = [sigmoid_belief_net, hard_attention, latent_options]


class Die(Categorical):
    """Draws that are chosen, so that all of them can be listed."""

    def sample(self, sample_shape=()):
        shape = self._extended_shape(sample_shape)
        x = torch.tensor([CHOOSER.choose(self._num_events) for _ in range(shape.numel())]).reshape(shape)
        CHOOSER.log_weight = CHOOSER.log_weight + self.log_prob(x).sum()
        return x


@pytest.fixture
def listed(monkeypatch, float64):
    """The programs take every draw in turn."""
    monkeypatch.setattr(sigmoid_belief_net, "Bernoulli", Coin)
    monkeypatch.setattr(hard_attention, "Categorical", Die)
    monkeypatch.setattr(latent_options, "Categorical", Die)


def disturbed(module):
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_()
    return module


def expected(module, graph, write):
    """Value and gradient of a graph's estimate, weighed by the probability of each run."""

    def run():
        with graph:
            write(graph)
        value = graph.surrogate().mean()
        gradient = torch.autograd.grad(value, list(module.parameters()), allow_unused=True, materialize_grads=True)
        return torch.cat([value.detach().reshape(1), *[part.flatten() for part in gradient]])

    return sum(weight.detach() * found for weight, found in CHOOSER.runs(run))


def exactly(module, value):
    gradient = torch.autograd.grad(value, list(module.parameters()), allow_unused=True, materialize_grads=True)
    assert max(part.abs().max() for part in gradient) > 1e-2
    return torch.cat([value.detach().reshape(1), *[part.flatten() for part in gradient]])


# -------------------------------------------------------------------------------------------------- sigmoid belief net

PIXELS = torch.tensor([[1.0, 0, 1], [0, 1, 1]])


@pytest.mark.usefixtures("float64")
def test_bound_and_evidence_are_sums_over_all_states():
    net, images = disturbed(TwoLayers(3, 3, 2)), PIXELS.double()
    joint, guide = [], []
    for z in states(5):
        lower, upper = z[:3], z[3:]
        above = log_bernoulli(net.prior, upper).sum() + log_bernoulli(net.down(upper), lower).sum()
        joint.append(above + log_bernoulli(net.out(lower), images).sum(-1))
        guide.append(log_bernoulli(net.up(images), lower).sum(-1) + log_bernoulli(net.top(lower), upper).sum())
    log_p, log_q = torch.stack(joint, -1), torch.stack(guide, -1)
    torch.testing.assert_close(log_q.exp().sum(-1), torch.ones(2), rtol=0, atol=1e-12)
    torch.testing.assert_close(net.log_evidence(images), log_p.logsumexp(-1), rtol=0, atol=1e-12)
    bound = (log_q.exp() * (log_p - log_q)).sum(-1)
    torch.testing.assert_close(net.exact_bound(images), bound, rtol=0, atol=1e-12)
    assert (bound < net.log_evidence(images)).all()


@pytest.mark.usefixtures("listed")
@pytest.mark.parametrize(("draws", "upper"), [(2, None), (1, 2), (2, 1)])
def test_the_belief_net_has_the_exact_gradient(draws, upper):
    net, images = disturbed(TwoLayers(3, 2, 1)), PIXELS[:1].double()
    found = expected(net, sf.StochasticGraph(draws), lambda g: net.program(g, images, upper))
    torch.testing.assert_close(found, exactly(net, -net.exact_bound(images).mean()), rtol=0, atol=1e-12)


def test_the_upper_layer_is_not_charged_with_pixels():
    with sf.StochasticGraph(2) as g:
        TwoLayers(3, 2, 1).program(g, PIXELS)
    charged = {cost for cost, sites in g.dependencies.items() if "upper" in sites}
    assert charged == {"log q(upper)", "-log p(lower)", "-log p(upper)"}


# ------------------------------------------------------------------------------------------------------ hard attention


def reader(kind, glimpses, images=1):
    generator = torch.Generator().manual_seed(1)
    patches = torch.randn(images, 3, 2, generator=generator, dtype=torch.float64)
    return disturbed(Reader(kind, glimpses, 3, 2, 3, 2)), Digits(patches, torch.tensor([1, 0, 1])[:images])


@pytest.mark.usefixtures("listed")
@pytest.mark.parametrize("kind", ["hard", "fixed", "random"])
@pytest.mark.parametrize("glimpses", [1, 2])
def test_the_reader_has_the_exact_gradient(kind, glimpses):
    eye, data = reader(kind, glimpses)
    found = expected(eye, sf.StochasticGraph(2), lambda g: eye.program(g, data))
    torch.testing.assert_close(found, exactly(eye, eye.exact_loss(data).mean()), rtol=0, atol=1e-12)


@pytest.mark.usefixtures("listed")
@pytest.mark.parametrize(("glimpses", "images"), [(1, 3), (2, 1)])
def test_with_the_first_place_enumerated_too(glimpses, images):
    """With one glimpse there is one run, and no noise."""
    eye, data = reader("hard", glimpses, images)
    first = sf.Enumerate(batch_ndim=1)
    found = expected(eye, sf.StochasticGraph(1), lambda g: eye.program(g, data, first=first))
    torch.testing.assert_close(found, exactly(eye, eye.exact_loss(data).mean()), rtol=0, atol=1e-12)


@pytest.mark.usefixtures("listed")
def test_curiosity_pays_for_the_entropy_of_what_comes_later():
    eye, data = reader("hard", 2)
    paid = torch.tensor(0.0)
    seen, state = eye.glimpses_of(data.patches)[0], eye.start
    for place, p in enumerate(eye.logits(0, state).softmax(-1)):
        then = Categorical(logits=eye.logits(1, eye.then(state, seen[place])))
        paid = paid - 0.3 * p * then.entropy()
    found = expected(eye, sf.StochasticGraph(2), lambda g: eye.program(g, data, curiosity=0.3))
    torch.testing.assert_close(found, exactly(eye, eye.exact_loss(data).mean() + paid), rtol=0, atol=1e-12)


def test_patches_lie_where_the_map_shows_them():
    train, test = hard_attention.load()
    assert train.patches.shape == (1200, 36, 9)
    assert test.patches.shape == (597, 36, 9)
    first = train.patches[0].reshape(6, 6, 3, 3)
    torch.testing.assert_close(first[2, 3, :, 1:], first[2, 4, :, :2], rtol=0, atol=0)
    torch.testing.assert_close(first[2, 3, 1:], first[3, 3, :2], rtol=0, atol=0)


# ------------------------------------------------------------------------------------------------------ latent options


@pytest.mark.usefixtures("float64")
def test_the_value_is_a_sum_over_all_episodes():
    walk = Walk(doors=2, cells=1, spare=1)
    policy = disturbed(Policy(walk, 3))
    value = torch.zeros(2)
    for hint, option in itertools.product(range(2), range(3)):
        for actions in itertools.product(range(3), repeat=walk.horizon):
            probability, total = policy.choice[hint].softmax(-1)[option], 0.0
            place = torch.tensor(0)
            for action in actions:
                probability = probability * policy.act[option, int(place >= 1)].softmax(-1)[action]
                reward, place = walk.step(place, torch.tensor(action), torch.tensor(hint))
                total += reward
            value[hint] += (probability * total).detach()
    torch.testing.assert_close(policy.exact_value(), value, rtol=0, atol=1e-12)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("options", [1, 2, 4])
def test_the_optimum_is_reached_by_a_policy_that_keeps_the_hint(options):
    walk = Walk(doors=3)
    policy = Policy(walk, options)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.fill_(-50.0)
        policy.act[:, 0, 0] = 50.0
        for k in range(options):
            policy.act[k, 1, 1 + k % 3] = 50.0
        for hint in range(3):
            policy.choice[hint, hint % options] = 50.0
    assert policy.exact_value().mean().item() == pytest.approx(walk.optimum(options), abs=1e-12)


@pytest.mark.usefixtures("listed")
@pytest.mark.parametrize(
    ("draws", "written"),
    [
        (2, {}),
        (1, {"followed": 2}),
        (1, {"estimator": sf.Enumerate(batch_ndim=1)}),
        (1, {"estimator": sf.UnorderedSet(2, batch_ndim=1)}),
    ],
    ids=["scored", "nested", "enumerated", "set"],
)
def test_the_policy_has_the_exact_gradient(draws, written, monkeypatch):
    policy = disturbed(Policy(Walk(doors=1, cells=1, spare=0), 2))
    if "estimator" in written:  # of two options it takes both, whatever the order

        def chosen(logits):
            return Categorical(logits=logits) if logits is policy.choice else Die(logits=logits)

        monkeypatch.setattr(latent_options, "Categorical", chosen)
    found = expected(policy, sf.StochasticGraph(draws), lambda g: policy.program(g, **written))
    torch.testing.assert_close(found, exactly(policy, -policy.exact_value().mean()), rtol=0, atol=1e-12)


def test_every_way_follows_the_same_number_of_episodes():
    for name in latent_options.WAYS[:-1]:
        draws, written = latent_options.way(name, 4)
        with sf.StochasticGraph(draws) as g:
            Policy(Walk(), 4).program(g, **written)
        assert g.log_prob("action[1]").shape[:-1].numel() == latent_options.EPISODES


# ------------------------------------------------------------------------------------------------------------ programs


def quick(program, out):
    steps = "--updates" if program is latent_options else "--steps"
    some = ["--readers", "hard", "soft"] if program is hard_attention else []
    return program.main([steps, "2", *some, "--seed", "3", "--out", str(out)])


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_program_writes_its_result_and_repeats_itself(program, tmp_path, monkeypatch):
    monkeypatch.setattr(latent_options, "REPEATS", 2)
    told = []
    for run in ("one", "two"):
        assert quick(program, tmp_path / run) == 0
        record = json.loads((tmp_path / run / "result.json").read_text(encoding="utf-8"))
        assert record["complete"] is True
        rows = record.get("ways") or record["readers"]
        told.append({name: {key: x for key, x in row.items() if key != "seconds"} for name, row in rows.items()})
    assert told[0] == told[1]
    name = program.__name__.rpartition(".")[2]
    assert (tmp_path / "one" / f"{name}.png").stat().st_size > 10_000
    assert not list(tmp_path.rglob("*.part"))


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--seed", "-1"], "it is -1, but must be 0 or more"), (["--seed", "x"], "no whole number: give 0 or more")],
)
def test_a_program_refuses_before_it_works(program, arguments, message, tmp_path, capsys):
    with pytest.raises(SystemExit):
        program.main([*arguments, "--out", str(tmp_path / "none")])
    assert message in capsys.readouterr().err
    assert not (tmp_path / "none").exists()
