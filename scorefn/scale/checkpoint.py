"""Where an interrupted run stands, on disk: written whole or not at all, and refused where it does not fit."""

from __future__ import annotations

import hashlib
import itertools
import operator
import os
import socket
import zipfile
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from scorefn.core import ScorefnError
from scorefn.core.representation import called

_FORMAT = 1
_PLAIN = frozenset({bool, bytes, complex, float, int, str, type(None), torch.device, torch.dtype, torch.Size})
_numbers = itertools.count()


def write_atomically(path: str | os.PathLike[str], state: Any) -> None:
    """Write a state so that, whatever happens meanwhile, the file holds the old one or the new one, whole.

    The state goes to another file in the same folder, is on the disk (fsync) before it takes the name of the old one,
    and the folder is synchronised too: a killed process or a lost machine costs at most the state that was being
    written. What killed processes of this machine left is removed. An error leaves the old file as it is.

    Args:
        path: its folder is made where it is missing.
        state: a dict of numbers, texts, tensors, and lists and dicts of them: what ``read_state`` gives back.

    Raises:
        ScorefnError: the state is no such dict, or path names no file. The old file is then as it was.

    Example:
        >>> import tempfile, torch, scorefn as sf
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = folder + "/state.pt"
        ...     sf.scale.write_atomically(path, {"step": 1, "mean": torch.zeros(2)})
        ...     try:
        ...         sf.scale.write_atomically(path, {"step": 2, "mean": {1.5, 2.5}})
        ...     except sf.ScorefnError as error:
        ...         str(error)
        ...     sf.scale.read_state(path)
        "state['mean'] is of type set, ..."
        {'step': 1, 'mean': tensor([0., 0.])}
    """
    path = _file(path)
    if not isinstance(state, dict):
        raise ScorefnError(
            f"A state must be a dict, but it is {type(state).__name__}: read_state gives back dicts only."
        )
    _check_plain(state, "state")
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(path)
    part = path.with_name(f"{path.name}.{_writer()}-{os.getpid()}-{next(_numbers)}.part")
    try:
        with part.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    if os.name != "nt":  # where folders cannot be opened
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def read_state(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The dict that ``write_atomically`` wrote, its tensors on the CPU; nothing in the file is executed.

    Raises:
        ScorefnError: no such file, a damaged one (a single wrong bit is found), or something else than a dict.

    Args:
        path: of the file.

    Example:
        >>> import tempfile, scorefn as sf
        >>> from pathlib import Path
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder, "state.pt")
        ...     sf.scale.write_atomically(path, {"step": 1, "mean": [0.5, 0.25]})
        ...     sf.scale.read_state(path)
        ...     whole = path.read_bytes()
        ...     _ = path.write_bytes(whole[:-10])
        ...     try:
        ...         sf.scale.read_state(path)
        ...     except sf.ScorefnError as error:
        ...         "it is damaged" in str(error)
        {'step': 1, 'mean': [0.5, 0.25]}
        True
    """
    path = _file(path)
    if not path.exists():
        raise ScorefnError(f"There is no checkpoint {path}: check the path, or begin anew.")
    try:
        with zipfile.ZipFile(path) as file:
            damaged = file.testzip()  # torch reads on where a checksum is wrong
        if damaged is not None:
            raise ValueError(f"wrong checksum of {damaged}")
        state = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(state, dict):
            raise TypeError(f"it holds {type(state).__name__}, no dict")
    except Exception as error:  # whatever a damaged file makes of the reader
        told = f"{type(error).__name__}: {' '.join(str(error).split())[:100]}"
        raise ScorefnError(
            f"{path} cannot be read as a checkpoint ({told}): it is damaged, or something else. Begin the run anew in "
            "another folder."
        ) from error
    return state


class Checkpoint:
    """The state of a search after each generation, as ``callback=`` of ``search.run`` or in a loop of one's own.

    A kill at any point loses at most the generation that was running (``every`` of them), and the search that goes on
    from the file equals the uninterrupted one to the bit::

        checkpoint = sf.scale.Checkpoint("runs/wing/search.pt", problem="wing, 40 panels")
        checkpoint.resume(strategy)
        run(strategy, fun, callback=checkpoint)

    The file holds the state of one strategy: ``minimize`` with restarts makes several, of which this keeps the first
    start only, and refuses another one. Budgets of ``run`` count anew after a resume; limits of the strategy do not.

    Args:
        path: of the file.
        problem: what is searched, in the caller's words: a file of another problem is refused.
        every: generations between two states.

    Raises:
        ScorefnError: every is no integer of at least 1, problem is no text, or path names no file.

    Example:
        >>> import tempfile
        >>> from scorefn.scale import Checkpoint
        >>> from scorefn.search import SNES, run
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     first = SNES([1.0, 2.0], 0.5, seed=0, maxiter=5)
        ...     checkpoint = Checkpoint(folder + "/search.pt", problem="sphere")
        ...     begun = checkpoint.resume(first)
        ...     result = run(first, lambda x: x.square().sum(), callback=checkpoint)
        ...     later = SNES([1.0, 2.0], 0.5, seed=0)
        ...     gone_on = Checkpoint(folder + "/search.pt", problem="sphere").resume(later)
        >>> begun, gone_on, later.result.iterations
        (False, True, 5)
    """

    def __init__(self, path: str | os.PathLike[str], *, problem: str = "", every: int = 1) -> None:
        if not isinstance(problem, str):
            raise ScorefnError(f"problem must be a text that names what is searched, but it is {problem!r}.")
        if isinstance(every, bool) or not hasattr(every, "__index__") or operator.index(every) < 1:
            raise ScorefnError(f"every must be an integer of at least 1, a number of generations, but it is {every!r}.")
        self.path = _file(path)
        self._problem = problem
        self._every = operator.index(every)
        self._start: dict[str, str] | None = None
        self._strategy: Any = None
        self._calls = 0

    def __repr__(self) -> str:
        return called(self, str(self.path), problem=self._problem or None, every=self._every)

    def resume(self, strategy: Any) -> bool:
        """Go on where the file stands; whether there is one. To be called once, before the first generation.

        Args:
            strategy: made anew, by the same code as the one that was saved: class, start, step sizes, popsize, rates
                and seed are compared, so that the state of another search is never taken for this one.

        Raises:
            ScorefnError: the file is damaged, or of another problem, search or version of scorefn; what differs is
                named. The strategy is then as before.
        """
        if isinstance(strategy, type) or not all(hasattr(strategy, name) for name in ("state_dict", "load_state_dict")):
            raise ScorefnError(
                f"strategy must have state_dict and load_state_dict, but {strategy!r} is no such object: make one, for "
                "instance CSANES(x0, sigma0)."
            )
        state = strategy.state_dict()
        start = _digests(state)
        if self.path.exists():
            strategy.load_state_dict(self._fitting(read_state(self.path), start, tuple(state)))
            found = True
        else:
            found = False
        self._start, self._strategy = start, strategy
        return found

    def __call__(self, strategy: Any) -> None:
        """Write the state of the strategy, where it is time.

        Raises:
            ScorefnError: ``resume`` was not called with this strategy.
        """
        if self._start is None or strategy is not self._strategy:
            raise ScorefnError(
                f"The checkpoint {self.path} was not asked about this strategy, and would overwrite what another one "
                "left: call resume(strategy) once before the first generation. Restarts cannot be kept in one file."
            )
        self._calls += 1
        if self._calls % self._every == 0 or strategy.stop:
            self.write()

    def write(self) -> None:
        """Write the present state, whatever ``every`` says."""
        if self._start is None:
            raise ScorefnError(f"There is nothing to write to {self.path} yet: call resume(strategy) first.")
        write_atomically(
            self.path,
            {
                "format": _FORMAT,
                "version": _version(),
                "problem": self._problem,
                "start": self._start,
                "search": self._strategy.state_dict(),
            },
        )

    def _fitting(self, saved: dict[str, Any], start: dict[str, str], entries: tuple[str, ...]) -> dict[str, Any]:
        """The state of the search, where the file belongs to it: where the entries of its start are the same."""
        repair = "Resume it with what wrote it, or begin anew with another path."
        if set(saved) != {"format", "version", "problem", "start", "search"} or saved["format"] != _FORMAT:
            raise ScorefnError(f"{self.path} is no checkpoint of a search, or one of another format. {repair}")
        for name, own in (("version", _version()), ("problem", self._problem)):
            if saved[name] != own:
                what = "version of scorefn" if name == "version" else name
                raise ScorefnError(
                    f"{self.path} is of another {what}, {saved[name]!r}, but this one is {own!r}. {repair}"
                )
        theirs = saved["start"]
        if not isinstance(theirs, dict) or not isinstance(saved["search"], dict):
            raise ScorefnError(f"{self.path} is no checkpoint of a search, or one of another format. {repair}")
        if set(theirs) - set(start) or any(theirs.get(name) != start[name] for name in entries):
            differs = {name for name in {*theirs, *start} if theirs.get(name) != start.get(name)}
            finest = sorted(name for name in differs if not any(other.startswith(f"{name}[") for other in differs))
            raise ScorefnError(
                f"{self.path} is of another search: the strategies differ at their start in {finest} (mean or "
                f"location: x0; generator: the seed). {repair}"
            )
        search: dict[str, Any] = saved["search"]
        return search


def _file(path: Any) -> Path:
    """A path that a file can have, or ScorefnError."""
    if not isinstance(path, str | os.PathLike) or not os.fspath(path) or "\0" in str(path):
        raise ScorefnError(f"path must name a file, but it is {path!r}: give a text or a pathlib.Path.")
    found = Path(path)
    if found.exists() and not found.is_file():
        what = "folder" if found.is_dir() else "device"
        raise ScorefnError(f"{found} is a {what}, where a file must stand: give the name of a file, such as run.pt.")
    return found


def _check_plain(part: Any, name: str) -> None:
    """Refuse what would be written but not read again, and say where it stands."""
    if isinstance(part, dict):
        for key, inner in part.items():
            _check_plain(key, f"a name in {name}")
            _check_plain(inner, f"{name}[{key!r}]")
    elif isinstance(part, list | tuple):
        for index, inner in enumerate(part):
            _check_plain(inner, f"{name}[{index}]")
    elif not isinstance(part, torch.Tensor) and type(part) not in _PLAIN:
        raise ScorefnError(
            f"{name} is of type {type(part).__name__}, which could be written but not read again: a checkpoint holds "
            "numbers, texts, tensors, and lists and dicts of them. Convert it, for instance by float, str or tolist."
        )


def _remove_leftovers(path: Path) -> None:
    """Remove what processes of this machine that have ended left beside a file."""
    if os.name == "nt":  # where asking for a process ends it
        return
    begin = f"{path.name}.{_writer()}-"
    for found in path.parent.iterdir():
        number, dash, rest = found.name.removeprefix(begin).partition("-")
        if found.name.startswith(begin) and rest.endswith(".part") and dash and number.isdecimal():
            try:
                os.kill(int(number), 0)
            except ProcessLookupError:
                found.unlink(missing_ok=True)
            except OSError:  # it lives, and is somebody else's
                pass


def _writer() -> str:
    """This machine, as the name of a file may have it."""
    return hashlib.sha256(socket.gethostname().encode()).hexdigest()[:8]


def _version() -> str:
    return str(import_module("scorefn").__version__)


def _digests(state: Mapping[str, Any]) -> dict[str, str]:
    """Of each entry, and of what is inside of those that are mappings: so that what differs can be named."""
    found = {}
    for name, entry in state.items():
        found[name] = _digest(entry)
        if isinstance(entry, Mapping):
            found |= _digests({f"{name}[{part!r}]": inner for part, inner in entry.items()})
    return found


def _digest(entry: Any) -> str:
    """A number that stands for plain values and tensors at any depth, to the bit."""
    found = hashlib.blake2b(digest_size=8)
    feed(found, entry)
    return found.hexdigest()


def feed(into: Any, entry: Any) -> None:
    """Feed a hash with plain values and tensors at any depth."""
    if isinstance(entry, torch.Tensor):
        into.update(f"{entry.dtype}{tuple(entry.shape)}".encode())
        entry = entry.detach().cpu().clone(memory_format=torch.contiguous_format)  # one entry may have any stride
        into.update(entry.view(-1).view(torch.uint8).numpy())
    elif isinstance(entry, Mapping):
        into.update(f"{len(entry)} entries".encode())
        for name, part in entry.items():
            into.update(repr(name).encode())
            feed(into, part)
    elif isinstance(entry, list | tuple):
        into.update(f"{len(entry)} items".encode())
        for part in entry:
            feed(into, part)
    else:
        into.update(repr(entry).encode())
