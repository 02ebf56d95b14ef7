"""Where torch computes: on the CPU, or on a CUDA card where there is one."""

from __future__ import annotations

from typing import Literal

import torch

from secure_fed.core.errors import DeviceError

Device = Literal["cpu", "cuda"]
DeviceChoice = Literal["auto", "cpu", "cuda"]


def choose_device(choice: DeviceChoice) -> Device:
    """The device to compute on; ``auto`` takes CUDA if torch can use it.

    Raises:
        DeviceError: CUDA is asked for, and torch finds none.
    """
    if choice == "cpu":
        return "cpu"
    if torch.cuda.is_available():
        return "cuda"
    if choice == "auto":
        return "cpu"
    built = torch.version.cuda or "none"
    raise DeviceError(
        f'device = "cuda", but torch {torch.__version__} (built for CUDA {built}) finds no card it can use; expected '
        'one with a driver of that age: install the driver, or set device = "auto" or "cpu"'
    )


def describe_device(device: Device) -> str:
    """The device's name for reports."""
    return "cpu" if device == "cpu" else f"cuda ({torch.cuda.get_device_name()})"
