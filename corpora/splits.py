"""A split by hash: what a take is for depends on its name alone, so that new recordings disturb no old ones."""

import hashlib
from collections.abc import Mapping, Sequence

SETS = ("train", "valid", "test")


def fraction_of(unit: str) -> float:
    """A number in [0, 1) that is always the same for a name, and spread evenly over names."""
    return int.from_bytes(hashlib.blake2b(unit.encode(), digest_size=7).digest(), "big") / 2**56


def assign(units: Sequence[str], valid: float, test: float, known: Mapping[str, str]) -> dict[str, str]:
    """The set of each unit; `valid` and `test` are shares. Those `known` from earlier stay where they are.

    Where there are so few units that a set would be empty, it is given the one with the smallest number.
    """
    sets = {unit: known[unit] if unit in known else _by_number(unit, valid, test) for unit in units}
    for name, share in (("test", test), ("valid", valid)):
        left = sorted((unit for unit in sets if sets[unit] == "train"), key=fraction_of)
        if share > 0 and name not in sets.values() and len(left) > 1:
            sets[left[0]] = name
    return sets


def _by_number(unit: str, valid: float, test: float) -> str:
    number = fraction_of(unit)
    return "test" if number < test else "valid" if number < test + valid else "train"
