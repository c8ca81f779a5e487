"""Which device a process computes on, where the user names one."""

from __future__ import annotations

import torch

from hf_llfc.errors import LLFCError

AUTO = "auto"
"""The accelerator where there is one, else the processor."""


def device_alone(wanted: str | None) -> torch.device | None:
    """The device that a user named for a process that shares its work with no other; None where none is named.

    Raises:
        LLFCError: See `chosen_device`.
    """
    if wanted is None:
        return None
    return chosen_device(wanted, _accelerator_here() or torch.device("cpu"))


def accelerator_of(device: torch.device | None) -> torch.device | None:
    """The device, unless it is the processor."""
    return device if device is not None and device.type != "cpu" else None


def chosen_device(wanted: str, of_process: torch.device, processes: int = 1) -> torch.device:
    """The device that a user named.

    Args:
        wanted: `auto`, `cpu`, or an accelerator as torch calls it: `cuda`, `cuda:1`, `xpu`.
        of_process: Where accelerate puts the models of this process.
        processes: How many there are.

    Raises:
        LLFCError: There is no such device here, it has no float64, or several processes are to share one.
    """
    if wanted == AUTO:
        wanted = of_process.type
    try:
        device = torch.device(wanted)
    except RuntimeError:
        raise LLFCError(f"device: {wanted!r} is no device of torch; write auto, cpu, cuda, cuda:1, …") from None
    if device.type == "cpu":
        if of_process.type != "cpu" and processes > 1:
            raise LLFCError(
                f"device: the launcher gave every process {of_process.type}; launch with ACCELERATE_USE_CPU=true "
                "instead"
            )
        return torch.device("cpu")
    here = _accelerator_here()
    count = torch.accelerator.device_count() if here is not None and here.type == device.type else 0
    if (device.index or 0) >= count:
        found = f"{count} of {device.type}" if count else "none" if here is None else f"only {here.type}"
        raise LLFCError(f"device: there is no {wanted} here (accelerators found: {found}); write cpu, or leave it out")
    if device.index is not None and processes > 1 and device != of_process:
        raise LLFCError(
            f"device: {wanted} cannot be that of {processes} processes; write {device.type}, and each has its own"
        )
    if device.type == "mps":
        raise LLFCError(
            "device: mps has no float64, in which tensors are summed; leave it out: models run on it all the same"
        )
    if device.index is None:
        return of_process if of_process.type == device.type else torch.device(device.type, 0)
    return device


def _accelerator_here() -> torch.device | None:
    return torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
