"""What the loaders share: reading files of named arrays, and the records that the data leave in.

Enters a folder that the caller names, never a path of our own; leave arrays with checked names and shapes. The one law:
whatever is missing or misshapen is an error that says what was found, what was expected and what to do.
"""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Generic, NamedTuple, Self, TypeVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["Samples", "Splits", "check_choice", "cut", "read_npz", "with_held_out"]

Shape = tuple[int | str, ...]


@dataclass(frozen=True, eq=False)
class Samples:
    """Base of the records: tensors with one row for each sample, `TensorDataset(*samples.tensors)`."""

    def __post_init__(self) -> None:
        lengths = {field.name: len(getattr(self, field.name)) for field in fields(self)}
        if len(set(lengths.values())) > 1:
            raise ValueError(f"found {lengths} rows, expected as many in every tensor of {type(self).__name__}")

    def __len__(self) -> int:
        return len(self.tensors[0])

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The tensors in the order of the attributes."""
        return tuple(getattr(self, field.name) for field in fields(self))

    def select(self, rows: Tensor | slice) -> Self:
        """Return the samples `rows`, a slice, a mask or indices."""
        return type(self)(*(tensor[rows] for tensor in self.tensors))


T = TypeVar("T")
S = TypeVar("S", bound=Samples)


class Splits(NamedTuple, Generic[T]):
    """Training, validation and test part of one data set."""

    train: T
    val: T
    test: T


def with_held_out(count: int) -> int:
    """Count the samples to simulate for `count` to train on, and a quarter (at least one) to validate and test each."""
    if count < 1:
        raise ValueError(f"found count={count}, expected at least 1 sample to train on")
    return count + 2 * max(count // 4, 1)


def cut(samples: S, count: int) -> Splits[S]:
    """Cut `with_held_out(count)` samples: the first `count` to train on, then halves to validate and to test."""
    half = count + (len(samples) - count) // 2
    return Splits(
        samples.select(slice(0, count)), samples.select(slice(count, half)), samples.select(slice(half, None))
    )


def check_choice(name: str, value: object, choices: tuple[object, ...]) -> None:
    """Raise unless `value`, the argument called `name`, is one of `choices`."""
    if value not in choices:
        raise ValueError(f"found {name}={value!r}, expected one of {', '.join(map(repr, choices))}")


def read_npz(folder: str | Path, name: str, shapes: Mapping[str, Shape]) -> dict[str, NDArray[Any]]:
    """Read arrays from the file `name` in `folder` and check their shapes.

    Args:
        folder: Folder that holds the file.
        name: File name.
        shapes: Shape of each array to read. A word stands for a size that is free, but the same wherever it is written.

    Returns:
        The arrays, by name.

    Raises:
        FileNotFoundError: If there is no such file.
        NotADirectoryError: If the folder is a file.
        ValueError: If it is no file of named arrays, lacks one, or one has another shape.
    """
    path = Path(folder) / name
    if path.parent.is_file():
        raise NotADirectoryError(
            f"found the file {str(folder)!r}, expected the folder that holds {name}; pass {str(path.parent.parent)!r}"
        )
    if not path.is_file():
        inside = sorted(entry.name for entry in path.parent.iterdir()) if path.parent.is_dir() else None
        found = "no such folder" if inside is None else f"{inside} in it" if inside else "an empty folder"
        raise FileNotFoundError(
            f"found {found}, expected the file {name} in {str(folder)!r}; pass the folder that holds it, "
            "or call synthetic(...) for data that need no file"
        )
    if not zipfile.is_zipfile(path):
        raise ValueError(f"found {path.stat().st_size} bytes in {name} that are no npz archive; copy the file again")
    with np.load(path, allow_pickle=False) as archive:
        missing = sorted(set(shapes) - set(archive.files))
        if missing:
            raise ValueError(f"found arrays {sorted(archive.files)} in {name}, expected also {missing}")
        arrays = {key: archive[key] for key in shapes}
    sizes: dict[str, int] = {}
    for key, shape in shapes.items():
        found_shape = arrays[key].shape
        wanted = [sizes.get(size, size) if isinstance(size, str) else size for size in shape]
        fits = len(found_shape) == len(wanted) and all(
            isinstance(size, str) or size == here for size, here in zip(wanted, found_shape, strict=True)
        )
        if not fits:
            raise ValueError(
                f"found shape {found_shape} for {key!r} in {name}, expected ({', '.join(map(str, wanted))})"
            )
        sizes.update((size, here) for size, here in zip(shape, found_shape, strict=True) if isinstance(size, str))
    return arrays
