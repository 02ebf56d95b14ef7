"""Where torch computes: on the CPU, or on a CUDA card where there is one."""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import StringConstraints

from secure_fed.core.errors import DeviceError

Device = str
"""``cpu``, ``cuda`` (the first card) or ``cuda:N``, the card of that number; one that is there."""

DeviceChoice = Annotated[str, StringConstraints(pattern=r"^(auto|cpu|cuda(:[0-9]{1,2})?)$")]
"""What a person may ask for."""


def choose_device(choice: DeviceChoice) -> Device:
    """The device to compute on; ``auto`` takes CUDA if torch can use it.

    Raises:
        DeviceError: CUDA or a card is asked for, and torch finds none, or none of that number.
    """
    if choice == "cpu":
        return "cpu"
    if torch.cuda.is_available():
        number = choice.partition(":")[2]
        cards = torch.cuda.device_count() if number else 1
        if number and int(number) >= cards:
            raise DeviceError(
                f'device = "{choice}", but torch finds {cards} cards here; expected a number from 0 to {cards - 1}: '
                'nvidia-smi lists them; "cuda" takes the first, "auto" one if there is any'
            )
        return choice if number else "cuda"
    if choice == "auto":
        return "cpu"
    built = torch.version.cuda or "none"
    raise DeviceError(
        f'device = "{choice}", but torch {torch.__version__} (built for CUDA {built}) finds no card it can use; '
        'expected one with a driver of that age: install the driver, or set device = "auto" or "cpu"'
    )


def describe_device(device: Device) -> str:
    """The device's name for reports."""
    return "cpu" if device == "cpu" else f"{device} ({torch.cuda.get_device_name(device)})"


def kind_of(device: Device) -> str:
    """``cpu`` or ``cuda``, whichever card: what results may depend on."""
    return device.partition(":")[0]
