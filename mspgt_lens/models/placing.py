"""Where a model that is loaded goes, and in which precision: one device, or several."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mspgt_lens.models.building import bridge_class
from mspgt_lens.processes import PeerError

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}
# The others have no float64, or not on every chip. On "meta" there are shapes only.
_WITH_FLOAT64 = ("cpu", "cuda", "meta")
# What torch says on the CPU and on MPS, where it raises no class of its own.
_NO_MEMORY = re.compile("out of memory|can't allocate memory|not enough memory", re.IGNORECASE)
DeviceMap = str | Mapping[str, str | int]
MaxMemory = Mapping[int | str, int | str]


def has_float64(device: torch.device) -> bool:
    """Whether tensors of float64 can be there; on Apple's MPS they cannot."""
    return device.type in _WITH_FLOAT64


def in_float64(tensor: Tensor) -> Tensor:
    """In float64: where the tensor is, or else in the CPU's memory."""
    return (tensor if has_float64(tensor.device) else tensor.cpu()).double()


def ran_out_of_memory(error: BaseException) -> bool:
    """Whether there was no memory left for a tensor or an array, on whatever device."""
    if isinstance(error, torch.cuda.OutOfMemoryError | MemoryError):
        return True
    # What another process lacks is told in its own words.
    is_own = isinstance(error, RuntimeError) and not isinstance(error, PeerError)
    return is_own and bool(_NO_MEMORY.search(str(error)))


@dataclass(frozen=True)
class Placement:
    """What TransformerLens and transformers are told of devices and precision.

    Attributes:
        device: One device; None for TransformerLens's own choice.
        dtype: Of the weights.
        device_map: How accelerate spreads the model over devices.
        n_devices: Number of CUDA devices to spread it over evenly.
        max_memory: What each device may take.

    Raises:
        TypeError: If ``dtype`` is neither a dtype nor the name of one.
        ValueError: If the device cannot be used here, or the arguments contradict one another.
    """

    device: str | None = None
    dtype: str | torch.dtype = torch.float32
    device_map: DeviceMap | None = None
    n_devices: int | None = None
    max_memory: MaxMemory | None = None

    def __post_init__(self) -> None:
        dtype = DTYPES.get(self.dtype) if isinstance(self.dtype, str) else self.dtype
        if dtype not in DTYPES.values():
            raise TypeError(
                f"dtype must be one of {', '.join(DTYPES)} (or torch's own), got {self.dtype!r}; "
                "quantized weights keep theirs whatever it is"
            )
        object.__setattr__(self, "dtype", dtype)
        if self.device is not None:
            _check_device(self.device)
        if self.n_devices is not None and self.n_devices < 1:
            raise ValueError(f"n_devices must be at least 1, got {self.n_devices}")
        if self.spread and self.device is not None:
            raise ValueError(
                f"device ({self.device!r}) puts the model on one device, and device_map or "
                "n_devices spread it over several: give one of them"
            )
        if self.device_map is not None and self.n_devices is not None:
            raise ValueError("device_map and n_devices both say how to spread the model: give one")
        if self.max_memory is not None and not self.spread:
            raise ValueError(
                "max_memory bounds what a spread model takes: give device_map='auto' or n_devices "
                "above 1 as well"
            )

    @property
    def spread(self) -> bool:
        """Whether accelerate places the parts of the model."""
        return self.device_map is not None or (self.n_devices or 1) > 1

    def for_hub(self) -> dict[str, Any]:
        """Arguments of TransformerLens's own loading.

        Raises:
            RuntimeError: If TransformerLens 2 is asked for what it does not have.
        """
        # Copies: accelerate writes sizes in bytes into what it is given.
        settings: dict[str, Any] = {"device": self.device}
        if self.dtype != torch.float32:
            settings["dtype"] = self.dtype
        if bridge_class() is None and (self.device_map is not None or self.max_memory is not None):
            raise RuntimeError(
                "device_map and max_memory need transformer-lens >= 3 (pip install -U "
                "transformer-lens); under 2.x n_devices spreads blocks over CUDA devices"
            )
        for name in ("device_map", "n_devices", "max_memory"):
            if getattr(self, name) is not None:
                settings[name] = copy.deepcopy(getattr(self, name))
        return settings

    def for_huggingface(self) -> dict[str, Any]:
        """Arguments of ``from_pretrained``, as TransformerLens gives them for a hub model."""
        from transformer_lens.utilities.devices import get_device
        from transformer_lens.utilities.multi_gpu import resolve_device_map

        settings: dict[str, Any] = {"dtype": self.dtype}
        device_map, max_memory = resolve_device_map(
            self.n_devices, self.device_map, None, self.max_memory
        )
        if device_map is None:
            device = self.device or str(get_device())
            # Straight to where it goes: a large model need not fit into the CPU's memory first.
            device_map = None if device == "cpu" else {"": device}
        if device_map is not None:
            settings["device_map"] = device_map
        if max_memory is not None:
            settings["max_memory"] = dict(max_memory)
        return settings


def _check_device(device: str) -> None:
    try:
        torch.empty(0, device=device)
    # By kind of device: unknown, not built into this torch, or not in this machine.
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(
            f"device: {device!r} cannot be used here ({str(error).splitlines()[0]}): give another, "
            "such as 'cpu', or nothing"
        ) from error
