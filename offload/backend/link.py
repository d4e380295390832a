"""What the system says of a card's bus and driver. Invariant: it is asked, never guessed, and None is an answer."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

_PCI = Path("/sys/bus/pci/devices")
_NVIDIA = Path("/proc/driver/nvidia/version")


def pci_link(properties: Any, devices: Path = _PCI) -> str | None:
    """The bus of a card in words ("16.0 GT/s PCIe x16"), from its torch properties.

    The highest speed, since an idle link slows down, and the width that it came up with. None where the card's
    address or the system's list of devices is not to be had.
    """
    try:
        bus, slot = int(properties.pci_bus_id), int(properties.pci_device_id)
        domain = int(getattr(properties, "pci_domain_id", 0))
        folder = devices / f"{domain:04x}:{bus:02x}:{slot:02x}.0"
        speed = (folder / "max_link_speed").read_text(encoding="ascii").strip()
        width = (folder / "current_link_width").read_text(encoding="ascii").strip()
    except (AttributeError, TypeError, ValueError, OSError):
        return None
    if not re.match(r"\d", speed) or not width.isdigit():  # "Unknown" in some virtual machines
        return None
    speed = speed if "PCIe" in speed else f"{speed} PCIe"
    return f"{speed} x{width}"


def driver_version(kernel: Path = _NVIDIA) -> str | None:
    """The NVIDIA driver's version, from nvidia-ml-py or the kernel; None without such a card."""
    try:
        import pynvml

        pynvml.nvmlInit()
        try:
            version = pynvml.nvmlSystemGetDriverVersion()
        finally:
            pynvml.nvmlShutdown()
    except Exception:  # not installed, or the library's own errors, whatever a driver that half works may raise
        return _kernels_version(kernel)
    return version.decode() if isinstance(version, bytes) else str(version)


def _kernels_version(kernel: Path) -> str | None:
    try:
        found = re.search(r"Kernel Module.*?\s(\d+\.\d+(?:\.\d+)?)", kernel.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found.group(1) if found else None
