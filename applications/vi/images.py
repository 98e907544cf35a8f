"""Binary images to train on and to test on: scikit-learn's digits, or files in MNIST's IDX format."""

from __future__ import annotations

import gzip
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from sklearn.datasets import load_digits
from torch import Tensor

import scorefn as sf

BATCH = 100
TRAIN = 1500  # of the 1797 digits
MAGIC = 0x803  # unsigned bytes, three dimensions
FILES = ("train-images-idx3-ubyte", "t10k-images-idx3-ubyte")


@dataclass(frozen=True)
class Images:
    """Pixels in [0, 1], ``[images, rows * columns]``.

    Args:
        train: grey where every minibatch is to be binarised anew.
        test: 0 or 1.
        shape: rows and columns of an image.
    """

    train: Tensor
    test: Tensor
    shape: tuple[int, int]

    @property
    def pixels(self) -> int:
        """Of an image."""
        return self.train.shape[1]

    @property
    def fingerprint(self) -> str:
        """Differs where the images do."""
        checksum = zlib.crc32(self.test.numpy().tobytes(), zlib.crc32(self.train.numpy().tobytes()))
        return f"{len(self.train)} + {len(self.test)} images of {self.pixels} pixels, {checksum:08x}"


class Batches(Iterator[Tensor]):
    """Without end: shuffled epochs, in minibatches of 0 and 1 ``[size, pixels]``; grey pixels are drawn each time anew.

    Args:
        images: in [0, 1], ``[images, pixels]``.
        seed: of the order and of the draws.
        size: the last minibatch of an epoch is smaller where it does not divide the number of images.
    """

    def __init__(self, images: Tensor, seed: int, size: int = BATCH) -> None:
        self.images = images
        self.size = size
        self.grey = bool(((images > 0) & (images < 1)).any())
        self._generator = torch.Generator().manual_seed(seed)
        self._order = torch.arange(0)  # of the present epoch
        self._position = 0

    def __next__(self) -> Tensor:
        """One minibatch."""
        if self._position >= len(self._order):
            self._order, self._position = torch.randperm(len(self.images), generator=self._generator), 0
        batch = self.images[self._order[self._position : self._position + self.size]]
        self._position += self.size
        return torch.bernoulli(batch, generator=self._generator) if self.grey else batch

    def state_dict(self) -> dict[str, Any]:
        """Where it stands."""
        return {"generator": self._generator.get_state(), "order": self._order, "position": self._position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        self._generator.set_state(state["generator"])
        self._order, self._position = state["order"], state["position"]


def digits() -> Images:
    """1500 images to train on and 297 to test on, 8x8 pixels, 1 where the grey level is at least 8."""
    images = torch.as_tensor(load_digits().data >= 8, dtype=torch.get_default_dtype())
    images = images[torch.randperm(len(images), generator=torch.Generator().manual_seed(0))]
    return Images(images[:TRAIN], images[TRAIN:], (8, 8))


def read_idx(path: Path) -> Tensor:
    """Grey images of an IDX file, gzipped or not, ``[images, rows, columns]``, uint8.

    The format: four big-endian integers (0x803 for unsigned bytes in three dimensions, images, rows, columns), then the
    bytes, row by row. Source: LeCun, Cortes & Burges, "The MNIST database of handwritten digits".

    Raises:
        sf.ScorefnError: no such file, not an IDX file of images, or one whose size is not what its header says.
    """
    try:
        content = path.read_bytes()
        if path.suffix == ".gz":
            content = gzip.decompress(content)
    except OSError as error:  # a bad gzip header is one, too
        raise sf.ScorefnError(f"{path} cannot be read: {error}. Give a readable IDX file, gzipped or not.") from error
    except (EOFError, zlib.error) as error:
        raise sf.ScorefnError(f"{path} is damaged or cut off ({error}): fetch it once more.") from error
    if len(content) < 4 or (magic := int.from_bytes(content[:4], "big")) != MAGIC:
        what = f"begins with {content[:4].hex() or 'nothing'}"
        hint = " (those are labels)" if content[:4] == b"\x00\x00\x08\x01" else ""
        raise sf.ScorefnError(
            f"{path} {what}{hint}, but an IDX file of images begins with {MAGIC:08x}: give the images-idx3-ubyte file."
        )
    del magic
    if len(content) < 16:
        raise sf.ScorefnError(
            f"{path} ends within its header, after {len(content)} of 16 bytes: it is cut off, fetch it once more."
        )
    count, rows, columns = struct.unpack(">3I", content[4:16])
    found, told = len(content) - 16, count * rows * columns
    if found != told:
        raise sf.ScorefnError(
            f"{path} holds {found} pixels, but its header says {count} images of {rows} x {columns}, which are {told}: "
            f"it is {'cut off' if found < told else 'longer than it should be'}, fetch it once more."
        )
    if told == 0:
        raise sf.ScorefnError(f"{path} has {count} images of {rows} x {columns} pixels: there is nothing to train on.")
    return torch.frombuffer(bytearray(content), dtype=torch.uint8, offset=16).reshape(count, rows, columns)


def read_folder(folder: Path, binarise: Literal["threshold", "dynamic"] = "threshold") -> Images:
    """``train-images-idx3-ubyte`` and ``t10k-images-idx3-ubyte``, gzipped or not; of one alone, a tenth is the test.

    Args:
        folder: that holds one of the files or both.
        binarise: "threshold": 1 where a pixel is 128 of 255 or more, once and for all. "dynamic": a pixel is 1 with
            probability grey/255, drawn anew whenever an image is used to train, and once for the test (Salakhutdinov &
            Murray 2008, "On the quantitative analysis of deep belief networks"); bounds of the two are not comparable.

    Raises:
        sf.ScorefnError: as ``read_idx``; there is no such file; the two differ in the size of their images.
    """
    paths = [next((p for p in (folder / name, folder / f"{name}.gz") if p.exists()), None) for name in FILES]
    read = {path.name: read_idx(path) for path in paths if path is not None}
    if not read:
        held = sorted(path.name for path in folder.iterdir())[:5] if folder.is_dir() else "no folder"
        raise sf.ScorefnError(
            f"{folder} has neither {FILES[0]} nor {FILES[1]}, gzipped or not (found: {held}): give the folder of "
            "MNIST's image files, or leave --data out for scikit-learn's digits."
        )
    sizes = {name: tuple(images.shape[1:]) for name, images in read.items()}
    if len(set(sizes.values())) > 1:
        raise sf.ScorefnError(f"Images to train on and to test on differ in size, {sizes}: give files that fit.")
    grey = [images.flatten(1).to(torch.get_default_dtype()) / 255 for images in read.values()]
    generator = torch.Generator().manual_seed(0)
    if len(grey) == 1:
        (only,) = grey
        if len(only) < 10:
            raise sf.ScorefnError(f"{folder} has {len(only)} images in all; to hold back a tenth, give 10 or more.")
        only = only[torch.randperm(len(only), generator=generator)]
        grey = [only[: -(len(only) // 10)], only[-(len(only) // 10) :]]
    train, test = grey
    shape = next(iter(sizes.values()))
    if binarise == "dynamic":
        return Images(train, torch.bernoulli(test, generator=generator), (shape[0], shape[1]))
    train, test = ((images > 0.5).to(images) for images in grey)
    return Images(train, test, (shape[0], shape[1]))
