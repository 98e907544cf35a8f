"""The discrete VAE in miniature: what it calls exact is exact, files are read or refused, runs go on bit for bit."""

import gzip
import json
import math
import struct

import pyro
import pytest
import torch

import scorefn as sf
from applications.vi import belief_net_bounds, discrete_vae, encoder_gradients, images
from applications.vi.belief_net import NETS, BeliefNet, frozen, states
from applications.vi.belief_net_training import LOSSES, Settings, Training, fit, run
from applications.vi.images import Batches, Images, read_folder, read_idx

# ------------------------------------------------------------------------------------------------------------- the net


def small_net(latents=3, layers=NETS["mixed"]):
    torch.manual_seed(0)
    net = BeliefNet(3, latents, 64, layers).double()
    with torch.no_grad():
        net.generator.prior.normal_()
        for parameter in net.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return net, images.digits().train[:3].double()


def test_probabilities_over_the_states_sum_to_one():
    torch.manual_seed(0)
    net, x = BeliefNet(3), images.digits().train[:3]
    torch.testing.assert_close(net.log_guide_of_states(x).logsumexp(-1), torch.zeros(3), atol=1e-5, rtol=0)
    posterior, guide = belief_net_bounds.marginals(net, x)
    weights = net.log_guide_of_states(x).detach().exp()
    torch.testing.assert_close(guide, weights @ states(10))
    evidence = torch.stack([net.log_joint_of_states(image[None]).logsumexp(-1) for image in x]).squeeze(-1)
    torch.testing.assert_close(net.exact_bound(x) + kl(net, x), evidence)
    assert posterior.shape == (3, 10)


def kl(net, x):
    log_q, log_posterior = net.log_guide_of_states(x), net.log_joint_of_states(x).log_softmax(-1)
    return (log_q.exp() * (log_q - log_posterior)).sum(-1)


@pytest.mark.parametrize("name", list(NETS))
def test_densities_are_those_of_the_states_and_of_pyro(name):
    net, x = small_net(layers=NETS[name])
    z = states(3).double()[:, None].expand(-1, 3, -1)
    torch.testing.assert_close(net.log_joint(x, z).T, net.log_joint_of_states(x))
    torch.testing.assert_close(net.q(x).log_prob(z).sum(-1).T, net.log_guide_of_states(x))
    trace = pyro.poutine.trace(pyro.poutine.condition(net.model, data={"z": z[5]}))
    with pyro.get_param_store().scope():
        assert trace.get_trace(x).log_prob_sum().item() == pytest.approx(net.log_joint(x, z[5:6]).sum().item())


@pytest.mark.parametrize("name", list(NETS))
def test_black_box_and_guide_have_the_gradient_of_the_bound(name):
    """Sum over all states of q f grad log q, in the logits, and from there in the encoder."""
    net, x = small_net(layers=NETS[name])
    q, f = frozen(net, x)
    z = states(3).double()[:, None].expand(-1, 3, -1)
    log_q = q.log_prob(z).sum(-1)
    (log_q.detach().exp() * f(z) * log_q).sum().backward()
    assert not f(z).requires_grad
    logits = net.encoder(x)
    net.encoder.zero_grad()
    logits.backward(q.logits.grad)
    exact = torch.autograd.grad(net.exact_bound(x).sum(), list(net.encoder.parameters()))
    for parameter, gradient in zip(net.encoder.parameters(), exact, strict=True):
        assert gradient.norm() > 1e-4
        torch.testing.assert_close(parameter.grad, gradient, atol=1e-12, rtol=1e-9)


def test_moving_the_logits_does_not_move_the_black_box():
    net, x = small_net()
    q, f = frozen(net, x)
    z = torch.ones(2, 3, 3, dtype=torch.float64)
    before = f(z)
    with torch.no_grad():
        q.logits.add_(1.0)
    assert torch.equal(f(z), before)


def test_estimated_bounds_are_the_exact_ones():
    """4.5 standard errors of the draws, which two numbers pass but once in 1e5; the global generator stays."""
    torch.manual_seed(0)
    net, x = BeliefNet(300), images.digits().test
    state = torch.get_rng_state()
    found, exact = belief_net_bounds.estimate(net, x, 400), belief_net_bounds.compare(net, x)
    assert torch.equal(torch.get_rng_state(), state)
    assert abs(found.bound - exact.bound) < 4.5 * found.error < 0.05
    assert exact.bound < found.importance_weighted < exact.log_evidence + 4.5 * found.importance_weighted_error


@pytest.mark.parametrize("name", ["leave-one-out", "vimco", "plain"])
def test_every_loss_climbs_the_bound(name):
    settings = {"steps": 12, "latents": 4, "net": "linear", "loss": name, "particles": 4, "learning_rate": 1e-2}
    training = Training(Settings(**settings), images.digits())
    before = belief_net_bounds.compare(training.net, training.test).bound
    run(training)
    assert belief_net_bounds.compare(training.net, training.test).bound > before + 1


def test_the_pieces_fit_together():
    seen = []
    fitted = fit(0, 10, seen.append, particles=2)
    assert [point.step for point in seen] == list(range(1, 11))
    assert fitted.train.shape == (1500, 64)
    result = belief_net_bounds.compare(fitted.net, fitted.test)
    assert 0 < result.gap < 5
    assert -64 * math.log(2) * 1.2 < result.log_evidence < 0
    rows = encoder_gradients.gradient_table(fitted.net, fitted.train, particles=(2,), repeats=5, warm_up=1)
    assert all(0.1 < row.error < 4 for row in rows)
    of = {row.name: row.variance for row in rows}
    assert of["ScoreFunctionELBO, leave-one-out"] < of["ScoreFunctionELBO, no baseline"] / 20
    assert encoder_gradients.table(rows).count("\n") == len(rows) + 1


def test_the_average_is_that_of_the_last_quarter():
    training, path = Training(Settings(steps=8, latents=2, net="linear"), images.digits()), []
    for _ in range(8):
        training.advance()
        path.append(training.net.encoder[0].weight.detach().clone())
    torch.testing.assert_close(training.averaged.encoder[0].weight, (path[-1] + path[-2]) / 2)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"net": "deep"}, "net is 'deep'.*linear"),
        ({"loss": "arm"}, "loss is 'arm'.*vimco"),
        ({"latents": 0}, "latents is 0.*1 or more"),
        ({"particles": 1}, "particles is 1.*2 or more"),
        ({"learning_rate": -1.0}, "learning_rate is -1.0"),
        ({"loss": "exact", "latents": 200}, r"200 latents have 2\^200.*12 latents at most"),
    ],
)
def test_settings_refuse(settings, message):
    with pytest.raises(sf.ScorefnError, match=message):
        Settings(**settings)


def test_too_many_states_are_refused():
    with pytest.raises(sf.ScorefnError, match=r"13 latents have 2\^13 states.*estimate"):
        BeliefNet(3, 13).exact_bound(torch.ones(2, 64))


# ---------------------------------------------------------------------------------------------------------- the images


def idx(pixels, magic=0x803):
    """An IDX file of images, as bytes."""
    return struct.pack(">4I", magic, *pixels.shape) + bytes(pixels.flatten().tolist())


PIXELS = torch.arange(20 * 2 * 3, dtype=torch.uint8).reshape(20, 2, 3) * 2


def test_idx_files_are_read_gzipped_or_not(tmp_path):
    (tmp_path / "plain").write_bytes(idx(PIXELS))
    (tmp_path / "packed.gz").write_bytes(gzip.compress(idx(PIXELS)))
    assert torch.equal(read_idx(tmp_path / "plain"), PIXELS)
    assert torch.equal(read_idx(tmp_path / "packed.gz"), PIXELS)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a", idx(PIXELS, 0x801), r"begins with 00000801 \(those are labels\).*00000803"),
        ("a", b"PNG!", "begins with 504e4721, but"),
        ("a", b"", "begins with nothing"),
        ("a", idx(PIXELS)[:10], "after 10 of 16 bytes"),
        ("a", idx(PIXELS)[:-1], r"holds 119 pixels.*20 images of 2 x 3, which are 120: it is cut off"),
        ("a", idx(PIXELS) + b"x", "holds 121 pixels.*longer"),
        ("a", idx(PIXELS[:0]), "0 images of 2 x 3.*nothing"),
        ("a.gz", idx(PIXELS), "cannot be read.*gzip"),
        ("a.gz", gzip.compress(idx(PIXELS))[:-9], "damaged or cut off"),
    ],
)
def test_what_is_no_idx_file_of_images_is_refused(name, content, message, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(sf.ScorefnError, match=f"{name}.*{message}"):
        read_idx(tmp_path / name)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(sf.ScorefnError, match="none.*cannot be read"):
        read_idx(tmp_path / "none")
    with pytest.raises(sf.ScorefnError, match=r"neither train-images.*found: no folder"):
        read_folder(tmp_path / "none")
    (tmp_path / "labels").touch()
    with pytest.raises(sf.ScorefnError, match=r"nor t10k-images.*found: \['labels'\]"):
        read_folder(tmp_path)


def test_a_folder_holds_both_or_one(tmp_path):
    (tmp_path / "t10k-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(PIXELS)))
    one = read_folder(tmp_path)
    assert (one.train.shape, one.test.shape, one.shape) == ((18, 6), (2, 6), (2, 3))
    together = torch.cat([one.train, one.test])
    assert sorted(together.sum(1).tolist()) == sorted((PIXELS >= 128).flatten(1).sum(1).tolist())
    (tmp_path / "train-images-idx3-ubyte").write_bytes(idx(PIXELS[:5]))
    both = read_folder(tmp_path)
    assert torch.equal(both.train, (PIXELS[:5] >= 128).flatten(1).float())
    assert len(both.test) == 20
    assert one.fingerprint != both.fingerprint
    (tmp_path / "train-images-idx3-ubyte").write_bytes(idx(PIXELS[:, :, :2]))
    with pytest.raises(sf.ScorefnError, match=r"differ in size.*\(2, 2\).*\(2, 3\)"):
        read_folder(tmp_path)


def test_too_few_images_to_hold_some_back(tmp_path):
    (tmp_path / "t10k-images-idx3-ubyte").write_bytes(idx(PIXELS[:9]))
    with pytest.raises(sf.ScorefnError, match="9 images in all.*10 or more"):
        read_folder(tmp_path)


def test_dynamic_pixels_are_drawn_anew_with_their_grey_as_probability(tmp_path):
    (tmp_path / "train-images-idx3-ubyte").write_bytes(idx(PIXELS))
    (tmp_path / "t10k-images-idx3-ubyte").write_bytes(idx(PIXELS))
    found = read_folder(tmp_path, "dynamic")
    torch.testing.assert_close(found.train, PIXELS.flatten(1) / 255)
    assert set(found.test.unique().tolist()) == {0.0, 1.0}
    batches = Batches(found.train[:1], seed=0)
    draws = torch.cat([next(batches) for _ in range(2000)])
    assert set(draws.unique().tolist()) <= {0.0, 1.0}
    p = found.train[0]
    assert ((draws.mean(0) - p).abs() <= 5 * (p * (1 - p) / 2000).sqrt()).all()  # 5 sigma


def test_an_epoch_holds_every_image_once():
    x = torch.arange(250.0)[:, None]
    batches = Batches(x, seed=0)
    epoch = [next(batches) for _ in range(3)]
    assert [len(batch) for batch in epoch] == [100, 100, 50]
    assert torch.equal(torch.cat(epoch).sort(0).values, x)
    assert not torch.equal(next(batches), epoch[0])


# ------------------------------------------------------------------------------------------------------------- going on

QUICK = ["--steps", "20", "--latents", "3", "--net", "linear", "--particles", "2", "--seed", "3"]


@pytest.mark.parametrize("loss", list(LOSSES))
def test_a_run_goes_on_bit_for_bit(loss, tmp_path):
    """From a step that no point of the curve falls on, with grey images: every generator counts."""
    torch.manual_seed(1)
    grey = Images(torch.rand(230, 6), torch.rand(20, 6).round(), (2, 3))
    settings = Settings(seed=3, steps=110, latents=3, net="nonlinear", loss=loss, particles=3)
    whole = Training(settings, grey)
    assert run(whole, tmp_path / "whole.pt")
    first, asked = Training(settings, grey), iter(range(110))
    assert not run(first, tmp_path / "part.pt", should_stop=lambda: next(asked) == 86)
    assert first.step == 87
    torch.rand(5)
    again = Training.load(tmp_path / "part.pt", grey)
    assert again.step == 87
    assert run(again, tmp_path / "part.pt")
    for one, other in ((whole.net, again.net), (whole.average, again.average)):
        for (name, a), b in zip(one.state_dict().items(), other.state_dict().values(), strict=True):
            assert torch.equal(a, b), name
    assert [(p.step, p.bound) for p in whole.curve] == [(p.step, p.bound) for p in again.curve]
    states = [torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in ("whole", "part")]
    assert torch.equal(states[0]["generator"], states[1]["generator"])
    assert set(states[0]["optimiser"]) == set(states[1]["optimiser"])


def test_a_training_leaves_pyros_parameters_alone():
    store = pyro.get_param_store()
    with store.scope():
        pyro.param("mine", torch.ones(2))
        fit(0, 2, particles=2, latents=2)
        assert list(store.keys()) == ["mine"]


def test_a_checkpoint_of_something_else_is_refused(tmp_path):
    path, digits = tmp_path / "checkpoint.pt", images.digits()
    with pytest.raises(sf.ScorefnError, match="no checkpoint"):
        Training.load(path, digits)
    path.write_bytes(b"not one")
    with pytest.raises(sf.ScorefnError, match="cannot be read as a checkpoint"):
        Training.load(path, digits)
    settings = Settings(steps=2, latents=2, net="linear")
    Training(settings, digits).save(path)
    with pytest.raises(sf.ScorefnError, match=r"'latents': \(2, 3\)"):
        Training.load(path, digits, Settings(steps=2, latents=3, net="linear"))
    with pytest.raises(sf.ScorefnError, match=r"begun with 1500 \+ 297 images.*these are 100 \+ 297"):
        Training.load(path, Images(digits.train[:100], digits.test, digits.shape), settings)
    state = torch.load(path, weights_only=True)
    torch.save(state | {"format": 0}, path)
    with pytest.raises(sf.ScorefnError, match="format 0"):
        Training.load(path, digits)
    assert not list(tmp_path.glob("*.part"))


# ------------------------------------------------------------------------------------------------------------- program


def test_the_program_writes_its_result(tmp_path, capsys):
    assert discrete_vae.main([*QUICK, "--repeats", "2", "--out", str(tmp_path)]) == 0
    told = json.loads((tmp_path / "result.json").read_text(encoding="utf-8"))
    assert list(told["results"]) == ["train", "test", "averaged, train", "averaged, test"]
    assert all(result["bound"] < result["log_evidence"] for result in told["results"].values())
    assert told["curve"][-1]["step"] == 20
    assert len(told["gradients"]["after training"]) == len(encoder_gradients.COMPARED)
    assert (tmp_path / "discrete_vae.png").stat().st_size > 10_000
    assert "log evidence" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        discrete_vae.main([*QUICK, "--out", str(tmp_path)])
    assert "add --resume" in capsys.readouterr().err
    assert discrete_vae.main([*QUICK, "--resume", "--out", str(tmp_path)]) == 0  # nothing is left to do
    again = json.loads((tmp_path / "result.json").read_text(encoding="utf-8"))
    assert again["results"] == told["results"]


def test_many_latents_of_idx_files_are_estimated(tmp_path):
    (tmp_path / "t10k-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(PIXELS)))
    arguments = ["--steps", "3", "--latents", "200", "--particles", "2", "--draws", "5", "--data", str(tmp_path)]
    assert discrete_vae.main([*arguments, "--binarise", "dynamic", "--out", str(tmp_path / "out")]) == 0
    told = json.loads((tmp_path / "out" / "result.json").read_text(encoding="utf-8"))
    for result in told["results"].values():
        assert result["draws"] == 5
        assert result["bound"] < result["importance_weighted"] < 0
        assert result["error"] > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "0"], "it is 0, but must be 1 or more"),
        (["--net", "deep"], "invalid choice: 'deep'"),
        (["--particles", "1"], "particles is 1, but must be 2 or more"),
        (["--loss", "exact", "--latents", "200"], "12 latents at most"),
        (["--repeats", "3", "--latents", "200"], "needs the exact gradient"),
        (["--data", "nowhere"], "nowhere has neither"),
        (["--binarise", "dynamic"], "--binarise is for the images of --data"),
        (["--resume"], "There is no checkpoint"),
    ],
)
def test_the_program_refuses_before_it_works(arguments, message, tmp_path, capsys):
    with pytest.raises(SystemExit):
        discrete_vae.main([*arguments, "--out", str(tmp_path / "none")])
    assert message in capsys.readouterr().err
    assert not (tmp_path / "none").exists()
