"""A split by hash: what a take is for depends on its name alone, so that new recordings disturb no old ones."""

import hashlib
from collections.abc import Mapping, Sequence

SETS = ("train", "valid", "test")


def fraction_of(unit: str) -> float:
    """A number in [0, 1) that is always the same for a name, and spread evenly over names."""
    return int.from_bytes(hashlib.blake2b(unit.encode(), digest_size=7).digest(), "big") / 2**56


def assign(
    units: Sequence[str],
    valid: float,
    test: float,
    known: Mapping[str, str],
    speakers: Mapping[str, str] | None = None,
) -> dict[str, str]:
    """The set of each unit; `valid` and `test` are shares. Those `known` from earlier stay where they are.

    speakers: of the units that have one. A speaker with so many units that a set's share is at least one of them is in
    that set. Where there are so few units that a set would be empty, it is given the one with the smallest number;
    training always has one.
    """
    sets = {unit: known[unit] if unit in known else _by_number(unit, valid, test) for unit in units}
    for name, share in (("test", test), ("valid", valid)):
        for group in _groups(units, speakers or {}):
            if share * len(group) >= 1:
                _fill(name, sets, group, movable=[unit for unit in group if unit not in known])
        if share > 0:
            new = [unit for unit in units if unit not in known]
            _fill(name, sets, units, movable=new or units)
    if units and "train" not in {sets[unit] for unit in units}:
        sets[max([unit for unit in units if unit not in known] or units, key=fraction_of)] = "train"
    return sets


def _groups(units: Sequence[str], speakers: Mapping[str, str]) -> list[list[str]]:
    """The units of each speaker."""
    groups: dict[str, list[str]] = {}
    for unit in units:
        if speaker := speakers.get(unit):
            groups.setdefault(speaker, []).append(unit)
    return list(groups.values())


def _fill(name: str, sets: dict[str, str], group: Sequence[str], movable: Sequence[str]) -> None:
    """Give a set that has none of a group the one with the smallest number, if training keeps another."""
    train = [unit for unit in group if sets[unit] == "train"]
    spare = set(train).intersection(movable)
    if spare and len(train) > 1 and name not in {sets[unit] for unit in group}:
        sets[min(spare, key=fraction_of)] = name


def _by_number(unit: str, valid: float, test: float) -> str:
    number = fraction_of(unit)
    return "test" if number < test else "valid" if number < test + valid else "train"
