"""Devices that are none: tensors say that they are elsewhere, and are computed on the CPU.

A backend in Python stands for one that this machine lacks. Numbers are real, so a model that is
spread over two devices can be compared with itself on one; and as on real devices, an operation
whose tensors are on different ones is refused, and as on some (MPS), float64.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

NAME = "virtual"
AVAILABLE = hasattr(backend_registration, "_setup_privateuseone_for_python_backend")


class Far(torch.Tensor):
    """A tensor on a virtual device; its values are in ``near``."""

    @staticmethod
    def __new__(cls, near: torch.Tensor, device: torch.device) -> Far:
        return torch.Tensor._make_wrapper_subclass(
            cls,
            near.shape,
            strides=near.stride(),
            storage_offset=near.storage_offset(),
            dtype=near.dtype,
            device=device,
            requires_grad=near.requires_grad,
        )

    def __init__(self, near: torch.Tensor, device: torch.device) -> None:
        self.near = near

    def tolist(self) -> Any:
        return self.near.tolist()

    @classmethod
    def __torch_dispatch__(
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return _run(function, args, kwargs or {})


@contextmanager
def virtual_devices() -> Iterator[None]:
    """Lets ``virtual:0``, ``virtual:1`` and so on be named as devices."""
    _register()
    before = torch._C._only_lift_cpu_tensors()
    torch._C._set_only_lift_cpu_tensors(True)
    try:
        with _Mode():
            yield
    finally:
        torch._C._set_only_lift_cpu_tensors(before)


def spread(model: Any, devices: Mapping[str, str]) -> Any:
    """A model of transformers over virtual devices, with accelerate's hooks.

    Args:
        model: The model.
        devices: From the beginning of modules' names to devices; what none of them begins is on the
            device that is named last.
    """
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    def place(name: str) -> str:
        found = [device for start, device in devices.items() if f"{name}.".startswith(start)]
        return found[0] if found else list(devices.values())[-1]

    placed: dict[int, torch.nn.Parameter] = {}
    for name, module in list(model.named_modules()):
        for kind in (module._parameters, module._buffers):
            for key, value in kind.items():
                if value is None:
                    continue
                far = value.detach().to(place(name))
                # One object for weights that are tied.
                wrapped = torch.nn.Parameter(far) if kind is module._parameters else far
                kind[key] = placed.setdefault(id(value), wrapped)
        if re.search(r"(embed|wte|wpe|emb|norm|ln_f|lm_head|h\.\d+|layers\.\d+)$", name):
            hook = AlignDevicesHook(execution_device=torch.device(place(name)))
            add_hook_to_module(module, hook)
    model.hf_device_map = dict(devices)
    return model


@cache
def _register() -> None:
    backend_registration._setup_privateuseone_for_python_backend(NAME)


class _Mode(TorchDispatchMode):
    """Takes what is made or moved, where no argument is on a virtual device yet."""

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return _run(function, args, kwargs or {})


def _run(function: Any, args: Any, kwargs: Any) -> Any:
    name = function.overloadpacket.__name__
    leaves = tree_leaves((args, kwargs))
    far = [leaf for leaf in leaves if isinstance(leaf, Far)]
    if name not in ("_to_copy", "copy_"):
        _require_one_device(function, name, leaves, far)
    near_args, near_kwargs = tree_map(
        lambda leaf: leaf.near if isinstance(leaf, Far) else leaf, (args, kwargs)
    )
    target = far[0].device if far else None
    asked = kwargs.get("device")
    if asked is not None:
        asked = torch.device(asked)
        target = asked if asked.type == NAME else None
        near_kwargs["device"] = torch.device("cpu") if target else asked
    out = function(*near_args, **near_kwargs)
    if name == "copy_":
        return args[0]
    same = {id(leaf.near): leaf for leaf in far}

    def wrapped(value: Any) -> Any:
        if not isinstance(value, torch.Tensor) or target is None:
            return value
        if value.dtype == torch.float64:
            raise TypeError(f"{function}: virtual devices, as Apple's, have no float64")
        known = same.get(id(value))
        return known if known is not None and known.device == target else Far(value, target)

    return tree_map(wrapped, out)


def _require_one_device(function: Any, name: str, leaves: list[Any], far: list[Far]) -> None:
    devices = {leaf.device for leaf in far}
    # As with real devices: numbers without axes may come from the CPU, and so may indices.
    others = [
        leaf
        for leaf in leaves
        if isinstance(leaf, torch.Tensor) and not isinstance(leaf, Far) and leaf.ndim
    ]
    if name in ("index", "index_put_", "index_put") and far and isinstance(leaves[0], Far):
        others = [leaf for leaf in others if leaf.is_floating_point()]
    if len(devices) > 1 or (devices and others):
        places = sorted({*map(str, devices), *(str(leaf.device) for leaf in others)})
        raise RuntimeError(f"{function}: tensors must be on one device, got {', '.join(places)}")
