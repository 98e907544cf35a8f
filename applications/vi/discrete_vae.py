"""Sigmoid belief nets with 10 to 200 binary latents, trained by score functions; ten latents beside what is exact.

The model is that of ``belief_net.py``: each image of 0 and 1 has K Bernoulli latents, independent in the prior and in
the guide. Encoder and decoder are those of one of its ``NETS``: ``linear`` has a single layer each way, ``nonlinear``
two hidden layers of 200 each way, ``mixed`` a hidden layer in the encoder alone. With up to 12 latents every state of
an image can be summed, so evidence, bound, posterior and gradient are exact; beyond, the bound and the
importance-weighted bound are estimated, with standard errors. Images are scikit-learn's digits, or MNIST's files where
``--data`` says. Run it with::

    python -m applications.vi.discrete_vae --steps 10000
    python -m applications.vi.discrete_vae --latents 200 --net nonlinear --data DIR --out runs/mnist

In ``--out``: ``result.json``, ``discrete_vae.png``, ``checkpoint.pt``. Ctrl-C stops after the present step;
``--resume`` goes on bit for bit. ``--repeats`` adds a table of the losses for Pyro (``encoder_gradients.py``),
``--study`` one of every estimator on the net that came out (``gradient_variance.py``), with its plot; with ``--resume``
and a finished checkpoint, either is all there is to do. The pieces are meant to be imported and copied: the net, its
training (``belief_net_training.py``), its bounds (``belief_net_bounds.py``), its gradients.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict, fields
from pathlib import Path

import torch
from torch import Tensor, nn

import scorefn as sf
from applications.arguments import at_least
from applications.progress import Interruption, show_line
from applications.results import write_result
from applications.vi import gradient_variance
from applications.vi import images as data
from applications.vi.belief_net import MOST_SUMMED, NETS
from applications.vi.belief_net_bounds import Comparison, Estimate, evaluate
from applications.vi.belief_net_training import LOSSES, Progress, Settings, Training, run
from applications.vi.encoder_gradients import gradient_table, table
from applications.vi.images import BATCH


def plot(training: Training, results: dict[str, Comparison | Estimate], path: Path) -> None:
    """The bound on the way; images, what the net makes of them, and what it dreams up."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4.5), layout="constrained")
    way, gallery = figure.subplots(1, 2)
    way.plot([p.step for p in training.curve], [p.bound for p in training.curve], color="C0", label="training")
    for number, (name, result) in enumerate(results.items(), start=1):
        way.axhline(result.bound, color=f"C{number}", ls="--", label=f"bound at the end, {name}")
    way.set(xlabel="step", ylabel=f"bound by {training.settings.loss}, nats per image")
    way.legend()
    gallery.imshow(pictures(training).numpy(), cmap="gray_r", vmin=0, vmax=1)
    gallery.set(title="new images, reconstructions, samples", xticks=[], yticks=[])
    figure.savefig(path, dpi=120)


@torch.no_grad()
def pictures(training: Training, columns: int = 12) -> Tensor:
    """Three rows of images, side by side, in [0, 1]."""
    net, (height, width) = training.net, training.images.shape
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        x = training.test[:columns]
        again = net.generator.decoder(net.q(x).sample()).sigmoid()
        dreamt = net.generator.decoder(torch.bernoulli(net.generator.prior.sigmoid().expand(len(x), -1))).sigmoid()
    rows = torch.stack([x, again, dreamt]).unflatten(-1, (height, width))
    framed: Tensor = nn.functional.pad(rows, (1, 1, 1, 1), value=0.3)
    return framed.permute(0, 2, 1, 3).reshape(3 * (height + 2), -1)


def show(progress: Progress) -> None:
    """One line that is written over on a terminal."""
    show_line(
        f"step {progress.step:6d} of {progress.steps}   bound {progress.bound:8.3f} nat/image   "
        f"{progress.seconds:6.1f} s CPU",
        last=progress.step == progress.steps,
    )


def show_rounds(done: int, rounds: int) -> None:
    """One line that is written over on a terminal."""
    show_line(f"round {done:5d} of {rounds}", last=done == rounds)


def _begin(options: argparse.Namespace) -> Training:
    """A new training, or the one in ``--out``."""
    settings = Settings(**{field.name: getattr(options, field.name) for field in fields(Settings)})
    checkpoint = options.out / "checkpoint.pt"
    if checkpoint.exists() and not options.resume:
        raise sf.ScorefnError(
            f"{checkpoint} belongs to an earlier run, which a new one would overwrite: add --resume to go on with it, "
            "or choose another folder with --out."
        )
    if options.binarise is not None and options.data is None:
        raise sf.ScorefnError("--binarise is for the images of --data: the digits are 1 from grey level 8 on.")
    images = data.digits() if options.data is None else data.read_folder(options.data, options.binarise or "threshold")
    if options.resume:
        return Training.load(checkpoint, images, settings)
    options.out.mkdir(parents=True, exist_ok=True)
    return Training(settings, images)


def main(argv: list[str] | None = None) -> int:
    """Train, compare with what is exact or estimate, write; 130 after Ctrl-C."""
    default = Settings()
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seed", type=at_least(0), default=default.seed)
    parser.add_argument("--steps", type=at_least(1), default=default.steps)
    parser.add_argument("--latents", type=at_least(1), default=default.latents)
    parser.add_argument("--net", choices=list(NETS), default=default.net)
    parser.add_argument("--loss", choices=list(LOSSES), default=default.loss)
    parser.add_argument("--particles", type=at_least(1), default=default.particles)
    parser.add_argument("--learning-rate", type=float, default=default.learning_rate)
    parser.add_argument("--data", type=Path, help="folder of MNIST's image files; default: scikit-learn's digits")
    parser.add_argument("--binarise", choices=["threshold", "dynamic"], help="of --data; default: threshold")
    parser.add_argument("--draws", type=at_least(2), default=100, help="for each image, where bounds are estimated")
    parser.add_argument("--repeats", type=at_least(0), default=0, help="estimates per loss in a table of gradients")
    parser.add_argument("--study", type=at_least(0), default=0, help="estimates per estimator and minibatch; 0: none")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out")
    parser.add_argument("--out", type=Path, default=Path("runs/discrete_vae"), help="folder of result and plot")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    try:
        if options.repeats and options.latents > MOST_SUMMED:
            raise sf.ScorefnError(
                f"--repeats needs the exact gradient: {MOST_SUMMED} latents at most, or leave it out."
            )
        if options.study == 1:
            raise sf.ScorefnError("--study is 1, but a variance takes 2 estimates or more: 100 are a good choice.")
        if options.study and options.latents == 1:
            raise sf.ScorefnError("--study needs 2 latents or more: with one, several estimators have no variance.")
        training = _begin(options)
    except (sf.ScorefnError, OSError) as error:
        parser.error(str(error))
    checkpoint = options.out / "checkpoint.pt"
    print(f"{training.images.fingerprint}; {asdict(training.settings)}")
    with Interruption() as interrupted:
        if not run(training, checkpoint, show, should_stop=interrupted):
            print(f"\nStopped. Go on with --resume from {checkpoint}.")
            return 130
    nets = {"": training.net, "averaged, ": training.averaged}
    results = {
        f"{kind}{name}": evaluate(net, images, options.draws)
        for kind, net in nets.items()
        for name, images in (("train", training.train), ("test", training.test))
    }
    for name, result in results.items():
        print(f"{name:>15}: {result}")
    gradients = {}
    if options.repeats:
        n = tuple(dict.fromkeys((2, max(2, options.particles))))
        before = Training(training.settings, training.images).net
        for name, net in (("before training", before), ("after training", training.net)):
            gradients[name] = gradient_table(net, training.train, particles=n, repeats=options.repeats)
            print(f"\ngradient of the encoder, batches of {BATCH} images, {name}\n{table(gradients[name])}")
    study = None
    if options.study:
        with Interruption() as interrupted:
            study = gradient_variance.study(
                training.net, training.train, options.study, progress=show_rounds, should_stop=interrupted
            )
        if study is None:
            print(f"\nStopped. Begin the study anew with --resume from {checkpoint}.")
            return 130
        print(study)
        gradient_variance.plot(study, options.out / "gradient_variance.png")
    record = {
        "images": training.images.fingerprint,
        "cpu_seconds": training.seconds,
        "results": {name: asdict(result) for name, result in results.items()},
        "gradients": {name: [asdict(row) for row in rows] for name, rows in gradients.items()},
        "study": None if study is None else study.record(),
        "curve": [asdict(point) for point in training.curve],
    }
    write_result(options.out, vars(options), record)
    plot(training, {name: results[name] for name in ("train", "test")}, options.out / "discrete_vae.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
