"""Frozen sections of named values, checked once by pydantic; every complaint is one line that names the key."""

import difflib
import json
import os
from collections.abc import Sequence
from types import UnionType
from typing import Annotated, Any, Literal, Self, TypeVar, get_args, get_origin

from pydantic import BaseModel, BeforeValidator, ConfigDict, FailFast, ValidationError, model_validator
from pydantic.fields import FieldInfo

from harness.errors import MAX_SHOWN, InputError
from harness.errors import show as show

_KINDS = {bool: "true or false", int: "a whole number", float: "a number", str: "a string"}

_LIMITS = {"ge": "at least", "gt": "above", "le": "at most"}

Section = TypeVar("Section", bound="Settings")

# --- types of fields --------------------------------------------------------------------------------------


def _boolean(value: Any) -> Any:
    return value == "True" if value in ("True", "False") else value


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


Switch = Annotated[bool, BeforeValidator(_boolean)]  # the published configs hold the strings "True" and "False"
Sizes = Annotated[tuple[int, ...], FailFast(), BeforeValidator(_tuple)]  # JSON has lists
Names = Annotated[str | tuple[str, ...], BeforeValidator(_tuple)]


# --- sections ---------------------------------------------------------------------------------------------


class Settings(BaseModel):
    """A section of settings: exact types (an int is also a float), finite numbers, known keys only, frozen.

    Whatever is wrong raises InputError, for the first problem only. What relates several values is checked by
    `model_validator(mode="after")` methods, which raise InputError too.
    """

    model_config = ConfigDict(
        strict=True,
        frozen=True,
        extra="forbid",
        allow_inf_nan=False,
        validate_default=False,
        protected_namespaces=(),  # keys may begin with model_
    )

    def __init__(self, /, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise InputError(_complaint(type(self), values, error)) from None

    @model_validator(mode="after")
    def _check_texts(self) -> Self:
        for name, value in self:
            for text in value if isinstance(value, tuple) else (value,):
                if isinstance(text, str) and not _is_name(text):
                    raise InputError(f"{name}: expected text that a file's name can hold, got {show(text)}")
        return self

    def replace(self, **changes: Any) -> Self:
        """A copy with other values, checked like the original."""
        return type(self)(**{**dict(self), **changes})

    def to_dict(self) -> dict[str, Any]:
        """Plain values by key, every key written out; sections inside are dicts too."""
        return self.model_dump()


def parse_section(section: type[Section], values: Any, prefix: str = "") -> Section:
    """A checked section from a dict, or as it is if it is one already; `prefix` precedes keys in errors."""
    if isinstance(values, section):
        return values
    if not isinstance(values, dict) or not all(isinstance(name, str) for name in values):
        raise InputError(f"{prefix.rstrip('.') or section.__name__}: expected an object, got {show(values)}")
    try:
        return section(**values)
    except InputError as error:
        raise InputError(f"{prefix}{error}") from None


def _is_name(text: str) -> bool:
    try:
        return b"\0" not in os.fsencode(text)
    except UnicodeEncodeError:  # half of a surrogate pair
        return False


# --- complaints -------------------------------------------------------------------------------------------


def _complaint(section: type[Settings], values: dict[str, Any], error: ValidationError) -> str:
    """One line on what is wrong: a key that is unknown, since others may be missing for it, or the first problem."""
    if unknown := [name for name in values if name not in section.model_fields]:
        return unknown_key(unknown[0], list(section.model_fields))
    problem = error.errors(include_url=False)[0]
    if not problem["loc"]:
        return str(problem["ctx"]["error"]) if problem["type"] == "value_error" else problem["msg"]
    name = problem["loc"][0]
    if problem["type"] == "missing":
        return f"{name}: missing"
    return f"{name}: expected {_expected(section.model_fields[name], problem)}, got {show(values[name])}"


def unknown_key(name: str, known: Sequence[str]) -> str:
    """Complaint of a key that is not among those `known`, with the one that was probably meant."""
    near = difflib.get_close_matches(name, known, n=1) if len(name) <= MAX_SHOWN else []
    hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(known)}"
    return f"{name if len(name) <= MAX_SHOWN else show(name)}: unknown key; {hint}"


def _expected(field: FieldInfo, problem: Any) -> str:
    """What would be valid, in words, from the bounds that were passed or the kind of the field."""
    context = problem.get("ctx", {})
    match problem["type"]:
        case "finite_number":
            return "a finite number"
        case "float_type" if type(problem["input"]) is int:  # one too large for a float
            return "a finite number"
        case "greater_than_equal":
            return f"at least {context['ge']}"
        case "greater_than":
            return f"a number above {context['gt']:g}"
        case "less_than_equal":
            return f"at most {context['le']}"
    return kind(field)


# --- reference --------------------------------------------------------------------------------------------


def kind(field: FieldInfo) -> str:
    """Values that a field takes, in words."""
    if get_origin(field.annotation) is Literal:
        return f"one of {', '.join(get_args(field.annotation))}"
    if get_origin(field.annotation) is UnionType:
        return "a string, or a list of strings"
    if get_origin(field.annotation) is tuple:
        return "a list of whole numbers"
    return _KINDS.get(field.annotation, "an object")


def reference_table(section: type[Settings]) -> str:
    """A Markdown table of a section's keys: type, default, range, meaning."""
    rows = ["| key | type | default | range | meaning |", "|---|---|---|---|---|"]
    for name, field in section.model_fields.items():
        default = "required" if field.is_required() else f"`{json.dumps(field.default)}`"
        cells = (f"`{name}`", kind(field).removeprefix("a "), default, _range(field), field.description or "")
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def _range(field: FieldInfo) -> str:
    limits = {name: getattr(limit, name) for limit in field.metadata for name in _LIMITS if hasattr(limit, name)}
    if "ge" in limits and "le" in limits:
        return f"{limits['ge']} to {limits['le']}"
    return ", ".join(f"{_LIMITS[name]} {value:g}" for name, value in limits.items())
