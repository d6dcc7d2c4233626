"""Results on disk: one safetensors file with a JSON header, never pickled, written atomically.

A checksum of header and arrays goes with them, so that a damaged file is told from a sound one.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import tempfile
from collections.abc import Iterable, Mapping, Sequence
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
    """
    file = _with_suffix(path)
    file.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(
        dir=file.parent, prefix=f"{file.stem}-", suffix=PARTIAL_SUFFIX
    )
    os.close(handle)
    told = {"format": _FORMAT, "kind": kind, **header}
    try:
        # Arrays in any other order than C's would come back scrambled.
        ordered = {name: np.asarray(array, order="C") for name, array in arrays.items()}
        # One text: safetensors writes several in any order, and equal results make equal files.
        text = json.dumps({**told, _CHECKSUM: _checksum(told, ordered)})
        save_file(ordered, temporary, metadata={_HEADER: text})
        # Temporary files are private; results are as readable as any new file.
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(temporary, 0o666 & ~mask)
        # On the disk before it takes its name, or a power cut could leave the name of nothing.
        _flush(temporary, os.O_RDWR)
        os.replace(temporary, file)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    if hasattr(os, "O_DIRECTORY"):
        _flush(file.parent, os.O_RDONLY)
    return file


def saved_kind(path: str | os.PathLike[str]) -> str:
    """Name of the class of the result that a file holds; empty where it holds something else.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file cannot be read, or is not as it was written.
    """
    file = Path(path) if Path(path).is_file() else _with_suffix(path)
    if not file.exists():
        raise FileNotFoundError(f"path: no saved result at {file}")
    return str(_opened(file, "result")[0].get("kind", ""))


def read_result(
    path: str | os.PathLike[str], kind: str
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Header and arrays that :func:`write_result` wrote.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file holds no result of this kind, or is not as it was written.
    """
    file = Path(path) if Path(path).is_file() else _with_suffix(path)
    if not file.exists():
        raise FileNotFoundError(f"path: no saved {kind} at {file}")
    header, arrays = _opened(file, kind)
    if header.get("kind") != kind or header.get("format") != _FORMAT:
        raise ValueError(
            f"path: {file} must hold a {kind} of format {_FORMAT}, got "
            f"{header.get('kind', 'something else')} of format {header.get('format')}"
        )
    return header, arrays


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
        value = dict(zip(kind._fields, value, strict=True))
    names = [f.name for f in fields(kind)] if is_dataclass(kind) else list(kind._fields)
    return {n: decode(hints[n], value[n], arrays) for n in names if n in value}


def _missing(column: Iterable[Any]) -> list[bool]:
    return [bool(value is None or value != value) for value in column]


def package_versions() -> dict[str, str]:
    """Versions of the packages that decide a result's numbers."""
    names = ("mspgt-lens", "transformer-lens", "transformers", "torch", "numpy", "scipy")
    return {name: metadata.version(name) for name in names} | {"python": platform.python_version()}


def _opened(file: Path, kind: str) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    try:
        with safe_open(file, framework="np") as opened:
            header = json.loads((opened.metadata() or {}).get(_HEADER, "{}"))
            arrays = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    except (SafetensorError, json.JSONDecodeError) as error:
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


def _with_suffix(path: str | os.PathLike[str]) -> Path:
    path = Path(path)
    return path if path.suffix == ".safetensors" else path.with_name(path.name + ".safetensors")
