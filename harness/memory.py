"""Memory there is, and the refusal of work that needs more, before it is taken."""

import math
import os
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import torch

from harness.errors import InputError

# Limits of a container or batch job, as Linux tells them: where, the limit's file, what counts against it.
_GROUPS = Path("/sys/fs/cgroup")
_VERSIONS = {"": (_GROUPS, "memory.max", "anon"), "memory": (_GROUPS / "memory", "memory.limit_in_bytes", "total_rss")}


def available_bytes(device: torch.device | None = None) -> float:
    """Memory that may still be taken, swap and the limits of a container included; of a CUDA device, its own.

    Infinite where the system does not say.
    """
    if device is not None and device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device))
    return min([_of_the_machine(), *_of_the_groups()])


def require_memory(needed: float, what: str, remedy: str, device: torch.device | None = None) -> None:
    """InputError where `what` takes more bytes than there are; needed: an estimate that is not too high."""
    available = available_bytes(device)
    if needed > available:
        place = "" if device is None or device.type == "cpu" else f" on {device}"
        raise InputError(
            f"{what}: at least {gigabytes(needed)} of memory, {gigabytes(available)} are free{place}; {remedy}"
        )


def gigabytes(n: float) -> str:
    """Bytes as people say them."""
    return f"{n / 1e9:.3g} GB" if n < 1e15 else f"{n / 1e9:.1e} GB"


def _of_the_machine() -> float:
    with suppress(OSError, ValueError):
        told = dict(re.findall(r"^(\w+):\s+(\d+) kB$", Path("/proc/meminfo").read_text(), re.MULTILINE))
        if "MemAvailable" in told:
            return 1024.0 * (int(told["MemAvailable"]) + int(told.get("SwapFree", 0)))
    with suppress(AttributeError, OSError, ValueError):
        return float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))  # all of it, where nobody tells more
    return math.inf


def _of_the_groups() -> Iterator[float]:
    """What each limit leaves of memory that cannot be given back at once, as file caches can."""
    with suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, version, group = line.split(":", 2)
            if version in _VERSIONS:
                top, limit, taken = _VERSIONS[version]
                own = top / group.strip("/")
                for folder in (own, *own.parents[: len(own.parts) - len(top.parts)]):  # limits hold for those within
                    yield _left(folder, limit, taken)


def _left(folder: Path, limit: str, taken: str) -> float:
    facts = None
    with suppress(OSError):
        facts = re.search(rf"^{taken} (\d+)$", (folder / "memory.stat").read_text(), re.MULTILINE)
    with suppress(OSError, ValueError):  # "max" where there is none
        return max(0.0, int((folder / limit).read_text()) - (int(facts[1]) if facts else 0))
    return math.inf
