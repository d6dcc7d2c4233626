"""Results on disk: one safetensors file with a JSON header, never pickled, written atomically.

A checksum of header and arrays goes with them, so that a damaged file is told from a sound one.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import platform
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from importlib import metadata
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import numpy as np
import pandas as pd
import torch
from jaxtyping import AbstractArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from torch import Tensor

try:
    import fcntl
except ImportError:
    fcntl = None  # type: ignore[assignment]

_HEADER = "mspgt_lens"
_CHECKSUM = "checksum"
_FORMAT = 2
# Of what is being written; a process that is killed meanwhile leaves it behind.
PARTIAL_SUFFIX = ".partial"


def write_result(
    path: str | os.PathLike[str],
    kind: str,
    header: Mapping[str, Any],
    arrays: Mapping[str, np.ndarray],
) -> Path:
    """Write one result; the suffix ``.safetensors`` is added where it is missing.

    Args:
        path: Where to write.
        kind: Name of the result's class.
        header: What describes it, for JSON.
        arrays: Its numbers.

    Returns:
        The path that was written.

    Raises:
        ValueError: If the path names no file.
        OSError: If it cannot be written there; what was there before is as it was.
    """
    file = result_file(path)
    told = {"format": _FORMAT, "kind": kind, **header}
    # Arrays in any other order than C's would come back scrambled.
    ordered = {name: np.asarray(array, order="C") for name, array in arrays.items()}
    # One text: safetensors writes several in any order, and equal results make equal files.
    text = json.dumps({**told, _CHECKSUM: _checksum(told, ordered)})
    with written_whole(file) as temporary:
        save_file(ordered, temporary, metadata={_HEADER: text})
    return file


@contextmanager
def written_whole(file: Path) -> Iterator[Path]:
    """Another path beside a file, whose content takes the file's name once it is all on the disk.

    Args:
        file: What is to be written; its folder is made where it is not there. A link stays one.

    Yields:
        Where to write.

    Raises:
        ValueError: If there is something else than a file: a folder, a device.
        OSError: If it cannot be written; what was there before is as it was.
    """
    file = file.resolve()
    if file.exists() and not file.is_file():
        raise ValueError(f"path must be a file, or nothing yet; {file} is something else")
    temporary: Path | None = None
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(PARTIAL_SUFFIX, f"{file.stem}-", file.parent)
        os.close(handle)
        temporary = Path(name)
        yield temporary
        # Temporary files are private; results are as readable as any new file.
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(temporary, 0o666 & ~mask)
        # On the disk before it takes its name, or a power cut could leave the name of nothing.
        _flush(temporary, os.O_RDWR)
        os.replace(temporary, file)
    except (OSError, SafetensorError) as error:
        # safetensors has no kind of its own for a full disk.
        kind = type(error) if isinstance(error, OSError) else OSError
        raise kind(
            f"path: {file} cannot be written ({error}); what was there before is as it was: make "
            "room or give another path"
        ) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
    if hasattr(os, "O_DIRECTORY"):
        _flush(file.parent, os.O_RDONLY)


@contextmanager
def held(file: Path) -> Iterator[None]:
    """A name that one process at a time holds; whoever ends, even by being killed, lets go of it.

    Where the system knows no such locks (Windows, some network disks), nobody is kept out.

    Args:
        file: An empty file of this name is there meanwhile.

    Raises:
        BlockingIOError: If another process holds it.
    """
    if fcntl is None:
        yield
        return
    with file.open("w") as opened:
        try:
            # Unlike flock, also between machines that share a network disk.
            fcntl.lockf(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                raise BlockingIOError(f"{file} is held by another process") from error
        try:
            yield
        finally:
            file.unlink(missing_ok=True)


def reserve(file: Path, n_bytes: int) -> None:
    """Make a file of this size, with its room on the disk.

    A file that is mapped into memory without it ends the whole process once the disk is full.

    Raises:
        OSError: If there is no room; no file is left.
    """
    try:
        with file.open("wb") as opened:
            if n_bytes and hasattr(os, "posix_fallocate"):
                os.posix_fallocate(opened.fileno(), 0, n_bytes)
            else:
                opened.truncate(n_bytes)
    except OSError as error:
        file.unlink(missing_ok=True)
        raise type(error)(
            f"path: {file} cannot be written, {n_bytes:,} bytes ({error}): make room or give "
            "another path"
        ) from error


def saved_kind(path: str | os.PathLike[str]) -> str:
    """Name of the class of the result that a file holds; empty where it holds something else.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file cannot be read, or is not as it was written.
    """
    return str(_opened(_found(path, "result"), "result")[0].get("kind", ""))


def read_result(
    path: str | os.PathLike[str], kind: str
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Header and arrays that :func:`write_result` wrote.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file holds no result of this kind, or is not as it was written.
    """
    file = _found(path, kind)
    header, arrays = _opened(file, kind)
    if header.get("kind") != kind or header.get("format") != _FORMAT:
        raise ValueError(
            f"path: {file} must hold a {kind} of format {_FORMAT}, got "
            f"{header.get('kind', 'something else')} of format {header.get('format')}"
        )
    return header, arrays


def result_file(path: str | os.PathLike[str]) -> Path:
    """The file that a result is saved in under this name.

    Raises:
        ValueError: If the path names no file.
    """
    path = Path(path)
    if not path.name:
        raise ValueError(f"path must name a file, got {str(path)!r}")
    return path if path.suffix == ".safetensors" else path.with_name(path.name + ".safetensors")


def encode(value: Any, name: str, arrays: dict[str, np.ndarray]) -> Any:
    """A value as JSON; arrays in it go into ``arrays``, and their names stand for them.

    Args:
        value: Numbers, texts, arrays, tensors, tables, dataclasses, and mappings and sequences of
            them.
        name: Of the first array in it; others add where they lie.
        arrays: Where arrays go.

    Raises:
        TypeError: If it holds anything else.
    """
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray | Tensor):
        arrays[name] = value.numpy(force=True) if isinstance(value, Tensor) else value
        return name
    if isinstance(value, pd.DataFrame):
        return {
            str(column): [None if missing else encode(x, name, arrays) for x, missing in cells]
            for column, cells in ((c, zip(v, _missing(v), strict=True)) for c, v in value.items())
        }
    if is_dataclass(value):
        value = {item.name: getattr(value, item.name) for item in fields(value)}
    if isinstance(value, Mapping):
        return {
            str(k): encode(v, f"{name}.{k}" if name else str(k), arrays) for k, v in value.items()
        }
    if isinstance(value, tuple | list | range):
        return [encode(v, f"{name}.{i}", arrays) for i, v in enumerate(value)]
    raise TypeError(f"{name}: a {type(value).__name__} cannot be saved")


def decode(hint: Any, value: Any, arrays: Mapping[str, np.ndarray]) -> Any:
    """What :func:`encode` made JSON of, as the annotation of its field says.

    Args:
        hint: The annotation. Nothing is made that it does not name.
        value: The JSON.
        arrays: The arrays that it names.
    """
    if value is None or hint is Any:
        return value
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        known = [option for option in inner if option is not type(None)]
        return decode(known[0], value, arrays) if len(known) == 1 else value
    if hint is np.ndarray or (isinstance(hint, type) and issubclass(hint, AbstractArray)):
        # Tensors are written, arrays are not.
        is_tensor = getattr(hint, "array_type", np.ndarray) is Tensor
        return torch.from_numpy(arrays[value].copy()) if is_tensor else arrays[value]
    if origin is tuple:
        kinds = [inner[0]] * len(value) if inner[-1] is Ellipsis else inner
        return tuple(decode(k, v, arrays) for k, v in zip(kinds, value, strict=True))
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return {inner[0](k): decode(inner[1], v, arrays) for k, v in value.items()}
    if hint is pd.DataFrame:
        return pd.DataFrame(value)
    if isinstance(hint, type) and (is_dataclass(hint) or hasattr(hint, "_fields")):
        return hint(**decoded_fields(hint, value, arrays))
    return value


def decoded_fields(
    kind: Any, value: Mapping[str, Any] | Sequence[Any], arrays: Mapping[str, np.ndarray]
) -> dict[str, Any]:
    """The fields of a dataclass, or of a named tuple; those that the file lacks are left out."""
    hints = get_type_hints(kind)
    if not isinstance(value, Mapping):
        # Files of earlier versions may lack the last ones.
        value = dict(zip(kind._fields[: len(value)], value, strict=True))
    names = [f.name for f in fields(kind)] if is_dataclass(kind) else list(kind._fields)
    return {n: decode(hints[n], value[n], arrays) for n in names if n in value}


def _missing(column: Iterable[Any]) -> list[bool]:
    return [bool(value is None or value != value) for value in column]


def package_versions() -> dict[str, str]:
    """Versions of the packages that decide a result's numbers."""
    names = ("mspgt-lens", "transformer-lens", "transformers", "torch", "numpy", "scipy")
    return {name: metadata.version(name) for name in names} | {"python": platform.python_version()}


def _found(path: str | os.PathLike[str], kind: str) -> Path:
    file = Path(path) if Path(path).is_file() else result_file(path)
    if not file.is_file():
        raise FileNotFoundError(f"path: no saved {kind} at {file}")
    return file


def _opened(file: Path, kind: str) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    try:
        with safe_open(file, framework="np") as opened:
            header = json.loads((opened.metadata() or {}).get(_HEADER, "{}"))
            arrays = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        if not isinstance(header, dict):
            raise TypeError(f"its header is a {type(header).__name__}")
    # Whatever stands there: a type that numpy lacks, a header that never ends.
    except (SafetensorError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"path: {file} is not a saved {kind}, or it is cut short ({error}); save it again, or "
            "take another copy"
        ) from error
    # Files of earlier versions have none.
    written = header.pop(_CHECKSUM, None)
    if written is not None and written != _checksum(header, arrays):
        raise ValueError(
            f"path: {file} is not as it was saved: its checksum is {_checksum(header, arrays)}, "
            f"and {written} is written in it; save it again, or take another copy"
        )
    return header, arrays


def _checksum(header: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> str:
    digest = hashlib.blake2b(json.dumps(header).encode(), digest_size=16)
    for name, array in sorted(arrays.items()):
        digest.update(f"{name} {array.dtype.str} {array.shape}".encode())
        digest.update(array.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def _flush(path: str | Path, flags: int) -> None:
    """See that what was written there has reached the disk."""
    handle = os.open(path, flags)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
