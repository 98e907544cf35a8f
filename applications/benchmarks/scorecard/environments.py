"""One virtual environment per peer, with pinned requirements."""

from __future__ import annotations

import subprocess
import sys
import venv
from dataclasses import dataclass
from pathlib import Path

TORCH = ("torch==2.13.0", "numpy==2.4.6")
JAX = ("jax==0.10.2", "numpy==2.4.6")


@dataclass(frozen=True)
class PeerEnvironment:
    """What a worker needs.

    Attributes:
        requirements: pinned; empty: this program's own Python does.
        alone: requirements that are installed without their dependencies.
        licence: where it matters for what may be done with the code.
    """

    requirements: tuple[str, ...]
    alone: tuple[str, ...] = ()
    title: str = ""
    home: str = ""


PEERS: dict[str, PeerEnvironment] = {
    "scorefn": PeerEnvironment((), title="scorefn"),
    "hand_written": PeerEnvironment(
        (),
        title="torch.distributions, by hand",
        home="https://docs.pytorch.org/docs/stable/distributions.html",
    ),
    "pyro": PeerEnvironment(("pyro-ppl==1.9.2", *TORCH), title="Pyro", home="https://docs.pyro.ai"),
    "storchastic": PeerEnvironment(
        ("pyro-ppl==1.9.2", *TORCH),
        ("storchastic==0.3.7", "entmax==1.3"),
        title="storchastic",
        home="https://github.com/HEmile/storchastic",
    ),
    "torchopt": PeerEnvironment(("torchopt==0.7.3", *TORCH), title="TorchOpt", home="https://torchopt.readthedocs.io"),
    "pydrobert": PeerEnvironment(
        ("pydrobert-pytorch==0.3.0", *TORCH),
        title="pydrobert-pytorch",
        home="https://pydrobert-pytorch.readthedocs.io",
    ),
    "relaxit": PeerEnvironment(
        ("relaxit==1.2.1", *TORCH), title="relaxit", home="https://github.com/intsystems/discrete-variables-relaxation"
    ),
    "torchrl": PeerEnvironment(
        ("torchrl==0.14.1", "tensordict==0.14.3", *TORCH), title="TorchRL", home="https://docs.pytorch.org/rl"
    ),
    "trl": PeerEnvironment(("trl==1.16.0", *TORCH), title="TRL", home="https://huggingface.co/docs/trl"),
    "tianshou": PeerEnvironment(("tianshou==2.0.1", *TORCH), title="Tianshou", home="https://tianshou.org"),
    "sb3": PeerEnvironment(
        ("stable-baselines3==2.9.2", *TORCH),
        title="Stable-Baselines3",
        home="https://stable-baselines3.readthedocs.io",
    ),
    "evotorch": PeerEnvironment(("evotorch==0.6.1", *TORCH), title="EvoTorch", home="https://docs.evotorch.ai"),
    "numpyro": PeerEnvironment(("numpyro==0.22.0", "funsor==0.4.8", *JAX), title="NumPyro", home="https://num.pyro.ai"),
    "tfp": PeerEnvironment(
        ("tfp-nightly==0.26.0.dev20261027", *JAX),
        title="TensorFlow Probability (JAX)",
        home="https://www.tensorflow.org/probability",
    ),
    "optax": PeerEnvironment(
        ("optax==0.2.6", *JAX), title="optax.monte_carlo", home="https://github.com/google-deepmind/optax/tree/v0.2.6"
    ),
    "rlax": PeerEnvironment(("rlax==0.1.9", *JAX), title="RLax", home="https://rlax.readthedocs.io"),
    "genjax": PeerEnvironment(
        ("genjax==0.10.3", "jax==0.5.3", "numpy==1.26.4"), title="GenJAX", home="https://pypi.org/project/genjax/"
    ),
    "evosax": PeerEnvironment(("evosax==0.3.2", *JAX), title="evosax", home="https://github.com/RobertTLange/evosax"),
    "pycma": PeerEnvironment(("cma==4.5.0", "numpy==2.4.6"), title="pycma", home="https://cma-es.github.io"),
    "cmaes": PeerEnvironment(
        ("cmaes==0.13.1", "numpy==2.4.6"), title="cmaes", home="https://github.com/CyberAgentAILab/cmaes"
    ),
}


def python_of(folder: Path) -> Path:
    """The interpreter of a virtual environment."""
    return folder / ("Scripts" if sys.platform == "win32" else "bin") / "python"


def interpreter(peer: str, folder: Path) -> tuple[Path | None, str]:
    """The Python that runs a peer's worker, its environment made where it is missing.

    Args:
        peer: a name of ``PEERS``.
        folder: holds one environment per peer, named after it.

    Returns:
        The interpreter, or None and the last line of what the installer said.
    """
    wanted = PEERS[peer]
    if not wanted.requirements:
        return Path(sys.executable), ""
    home = folder / peer
    python = python_of(home)
    if python.exists():
        return python, ""
    print(f"{peer}: installing {', '.join(wanted.requirements + wanted.alone)}", flush=True)
    venv.create(home, with_pip=True)
    for packages, options in ((wanted.requirements, []), (wanted.alone, ["--no-deps"])):
        if not packages:
            continue
        done = subprocess.run(
            [str(python), "-m", "pip", "install", "--quiet", *options, *packages],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            said = [line for line in (done.stderr + done.stdout).splitlines() if line.strip()]
            return None, said[-1] if said else f"pip ended with {done.returncode}"
    return python, ""
