"""What a figure depends on beside the code: the device, its driver, the versions. Read only."""

import os
import platform
import subprocess
from typing import Any

from jaxengine.info import versions

QUERY = ("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")


def machine(device: Any) -> dict[str, Any]:
    is_gpu = device.platform != "cpu"
    stats = device.memory_stats() or {}
    return {
        "device": device.device_kind if is_gpu else platform.processor() or platform.machine(),
        "platform": device.platform,
        "memory_bytes": stats.get("bytes_limit"),
        "driver": driver() if is_gpu else None,
        "runtime": device.client.platform_version,
        "cpu_count": os.cpu_count(),
        "system": platform.platform(),
        "versions": versions(),
    }


def driver() -> str | None:
    """Version of the NVIDIA driver; None where it cannot be asked."""
    try:
        done = subprocess.run(QUERY, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return next(iter(done.stdout.split()), None)


def summary(facts: dict[str, Any]) -> str:
    found = facts["versions"]
    driver = f", driver {facts['driver']}" if facts["driver"] else ""
    return (
        f"{facts['device']} ({facts['platform']}){driver}, {facts['cpu_count']} CPU cores, "
        f"JAX {found['jax']}, Python {found['python']}"
    )
