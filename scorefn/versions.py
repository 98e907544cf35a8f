"""The versions of what the library runs on."""

import os
import platform
import sys
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TextIO

OPTIONAL = {
    "gymnasium": "rl",
    "pyro-ppl": "vi",
    "matplotlib": "apps",
    "rich": "apps",
    "cma": "apps",
    "ray": "scale",
    "mpi4py": "",
}


def show_versions(file: TextIO | None = None) -> None:
    """Print what a report of a fault should say: versions, system, threads, and which optional packages there are.

    Nothing is imported for it but torch, which is loaded already; nothing is read but the installed packages' names
    and versions.

    Args:
        file: where to; None: the standard output.

    Example:
        >>> from scorefn import show_versions
        >>> show_versions()  # doctest: +ELLIPSIS
        scorefn     ...
        Python      ...
    """
    import torch

    accelerator = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU only"
    rows = [
        ("scorefn", import_module("scorefn").__version__),
        ("Python", f"{platform.python_version()} ({sys.executable})"),
        ("system", platform.platform()),
        ("torch", f"{torch.__version__} ({accelerator}, {_devices(torch.cuda.device_count())})"),
        ("threads", f"torch {torch.get_num_threads()}, OMP_NUM_THREADS {os.environ.get('OMP_NUM_THREADS', 'not set')}"),
        ("numpy", _installed("numpy", "")),
    ]
    rows += [(name, _installed(name, extra)) for name, extra in OPTIONAL.items()]
    for name, text in rows:
        print(f"{name:<11} {text}", file=file)


def _devices(count: int) -> str:
    return "no GPU seen" if not count else f"{count} GPU{'s' if count > 1 else ''} seen"


def _installed(name: str, extra: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed" + (f" (pip install scorefn[{extra}])" if extra else "")
