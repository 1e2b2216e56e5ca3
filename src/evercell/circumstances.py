"""What a training depends on besides data, settings and seed: how its files were read, versions, threads, device.

The ledger holds it, so that a stage can be run again and a difference explained.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping
from importlib import metadata
from typing import Any

import torch

from evercell import __version__

PACKAGES = ("torch", "numpy", "scipy", "scikit-learn")


def circumstances(device: torch.device) -> dict[str, Any]:
    """Versions, threads, kind of processor and device of this process; JSON values."""
    return {
        "evercell": __version__,
        **{name: metadata.version(name) for name in PACKAGES},
        "threads": torch.get_num_threads(),
        "processor": platform.machine(),
        "device": device.type,
    }


def differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What is not as it was, such as ``torch 2.12.0, now 2.13.0``."""
    return [f"{name} {then[name]}, now {now.get(name)}" for name in then if then[name] != now.get(name)]
