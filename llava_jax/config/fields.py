"""Defines metadata for the types of config fields, and checks configs against this metadata.

    rank: Annotated[int, at_least(1, "an adapter of rank 0 has no weights")]
    memory: Annotated[MemoryConfig, PLAN]

A `Bound` says which values are allowed and why, and a `Role` says what the field decides.
`IGNORED_BY_PLAN` says that the memory of a train step does not depend on the field. Only
`check_fields` and `field_paths` read this metadata.

The validators of beartype (`Annotated[int, Is[...]]`) could check bounds as well, but their errors
show the code of the check instead of the allowed values and the reason.
"""

import dataclasses
import functools
import math
import types
from collections.abc import Callable, Iterator
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from beartype import BeartypeConf
from beartype.door import is_bearable

from llava_jax.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Role:
    """What the value of a config field decides, for example what is learned (`RECIPE`).

    A field without a role has the role of its group, or else the role `RECIPE`.

    Attributes:
        name: Name of the role.
        may_change: Whether the value may change when a run resumes.
        may_differ: Whether each process of a run may have its own value.
        is_ignored_by_plan: Whether the value does not affect the memory that a train step needs.
    """

    name: str
    may_change: bool
    may_differ: bool
    is_ignored_by_plan: bool


RECIPE = Role("recipe", may_change=False, may_differ=False, is_ignored_by_plan=False)
"""The field decides what is learned."""

PLAN = Role("plan", may_change=True, may_differ=False, is_ignored_by_plan=False)
"""The field decides how the run fits its devices, and never changes a result."""

OBSERVED = Role("observed", may_change=True, may_differ=False, is_ignored_by_plan=True)
"""The field decides how the run is named, saved, measured, shown or stopped."""

RESOLVED = Role("resolved", may_change=True, may_differ=False, is_ignored_by_plan=True)
"""The field only determines another field; a resumed run compares that other field instead."""

LOCATION = Role("location", may_change=True, may_differ=True, is_ignored_by_plan=True)
"""The field says where files are. A resumed run compares the contents of the files instead."""

MACHINE = Role("machine", may_change=True, may_differ=True, is_ignored_by_plan=True)
"""The field depends on the machine of the process, for example on its number of cores."""


class IgnoredByPlan:
    """Type of `IGNORED_BY_PLAN`, which marks fields that do not affect a train step's memory."""


IGNORED_BY_PLAN = IgnoredByPlan()


@dataclasses.dataclass(frozen=True)
class Bound:
    """Condition on the values of a field. The value None is not checked.

    Attributes:
        allows: Function that returns True if a value is allowed.
        text: Text that completes "it must be ..." in the error message.
        reason: Reason for the condition, in a few words.
    """

    allows: Callable[[Any], bool]
    text: str
    reason: str


def at_least(minimum: int | float, reason: str) -> Bound:
    """Returns the condition that a number must be finite and at least `minimum`."""
    return Bound(lambda value: minimum <= value < math.inf, f"at least {minimum:g}", reason)


def at_most(maximum: int | float, reason: str) -> Bound:
    """Returns the condition that a number must be at most `maximum`."""
    return Bound(lambda value: value <= maximum, f"at most {maximum:,g}", reason)


def above(minimum: int, reason: str) -> Bound:
    """Returns the condition that a number must be finite and greater than `minimum`."""
    return Bound(lambda value: minimum < value < math.inf, f"above {minimum}", reason)


def fraction(reason: str) -> Bound:
    """Returns the condition that a number must be at least 0 and less than 1."""
    return Bound(lambda value: 0 <= value < 1, "at least 0 and less than 1", reason)


def within(minimum: int | float, maximum: int | float, reason: str) -> Bound:
    """Returns the condition that a number must be from `minimum` to `maximum`."""
    text = f"from {minimum:g} to {maximum:g}"
    return Bound(lambda value: minimum <= value <= maximum, text, reason)


NOT_EMPTY = Bound(
    lambda text: text != "", "a text that is not empty", "to set no value, leave it out"
)
"""Condition that a text must not be empty."""

MAX_INTEGER = 2**32 - 1
"""Largest absolute value of an integer in a config."""

MIN_FLOAT, MAX_FLOAT = 2.0**-126, (2.0 - 2.0**-23) * 2.0**127
"""Smallest and largest positive number of the type float32, without subnormal numbers."""


@dataclasses.dataclass(frozen=True)
class Field:
    """A field of a config class, with its metadata sorted by kind.

    Attributes:
        name: Name of the field in its class.
        type: Type of the field, without metadata.
        role: Role of the field.
        bounds: Conditions on the value.
        is_ignored_by_plan: Whether the field or its role says that the value does not affect the
            memory that a train step needs.
    """

    name: str
    type: Any
    role: Role
    bounds: tuple[Bound, ...]
    is_ignored_by_plan: bool


@functools.cache
def read_fields(config_class: type, role: Role = RECIPE) -> tuple[Field, ...]:
    """Returns the fields of a config class in the order of their definition.

    Args:
        config_class: Dataclass whose fields are read.
        role: Role of the fields whose metadata contains no role.
    """
    found = []
    plain = get_type_hints(config_class)
    for name, hint in get_type_hints(config_class, include_extras=True).items():
        metadata = hint.__metadata__ if get_origin(hint) is Annotated else ()
        own_role = next((mark for mark in metadata if isinstance(mark, Role)), role)
        bounds = tuple(mark for mark in metadata if isinstance(mark, Bound))
        is_ignored = own_role.is_ignored_by_plan or IGNORED_BY_PLAN in metadata
        found.append(Field(name, plain[name], own_role, bounds, is_ignored))
    return tuple(found)


def field_paths(config_class: type, is_wanted: Callable[[Field], bool]) -> frozenset[str]:
    """Returns the dotted names of all fields for which `is_wanted` returns True.

    If `is_wanted` returns True for a group, the result contains the name of the group instead of
    the names of its fields.

    Args:
        config_class: Dataclass whose fields are searched, including those of nested dataclasses.
        is_wanted: Function that takes a field and returns True if the field is wanted.
    """

    def walk(config_class: type, role: Role, prefix: str) -> Iterator[str]:
        for field in read_fields(config_class, role):
            if is_wanted(field):
                yield prefix + field.name
            elif isinstance(field.type, type) and dataclasses.is_dataclass(field.type):
                yield from walk(field.type, field.role, f"{prefix}{field.name}.")

    return frozenset(walk(config_class, RECIPE, ""))


def field_groups(config_class: type, prefix: str = "") -> Iterator[tuple[type, str]]:
    """Yields a config class and all classes of its fields, also of optional fields.

    Args:
        config_class: Dataclass to start with.
        prefix: Text in front of the names of its fields, for example "model.llm.". Each class is
            yielded with its own prefix.
    """
    yield config_class, prefix
    for field in read_fields(config_class):
        for kind in (field.type, *get_args(field.type)):
            if isinstance(kind, type) and dataclasses.is_dataclass(kind):
                yield from field_groups(kind, f"{prefix}{field.name}.")


def check_fields(config: Any, prefix: str = "") -> None:
    """Checks the value of each field, also in nested dataclasses, against its type and bounds.

    Args:
        config: Instance of a dataclass.
        prefix: Text in front of the names of fields in error messages.

    Raises:
        ConfigError: A field has a value that its type or its bounds do not allow.
    """
    for field in read_fields(type(config)):
        path, value = prefix + field.name, getattr(config, field.name)
        # Dataclasses do not check the types of their fields, and a config file may pass any value.
        if not has_type(value, field.type):
            raise ConfigError(f"{path} = {value!r}: it must be {_describe_type(field.type)}")
        for bound in field.bounds:
            if value is not None and not bound.allows(value):
                raise ConfigError(f"{path} = {value!r}: it must be {bound.text} ({bound.reason})")
        items = value if isinstance(value, tuple) else (value,)
        for item in (*value, *value.values()) if isinstance(value, dict) else items:
            check_text(item, path)
            _check_size(item, path)
        if dataclasses.is_dataclass(value):
            check_fields(value, f"{path}.")


def has_type(value: Any, hint: Any) -> bool:
    """Returns True if a value has a type. beartype checks a single item of a tuple or of a dict."""
    if get_origin(hint) in (Union, types.UnionType):
        return any(has_type(value, choice) for choice in get_args(hint))
    if isinstance(value, tuple) and get_args(hint)[1:] == (...,):
        return all(has_type(item, get_args(hint)[0]) for item in value)
    if isinstance(value, dict) and get_origin(hint) is dict:
        kinds = get_args(hint)
        return all(all(map(has_type, item, kinds)) for item in value.items())
    return is_bearable(value, hint, conf=BeartypeConf(is_pep484_tower=True))


def check_text(value: Any, path: str) -> None:
    """Checks that a string can be used in paths, files and tokenizers.

    Args:
        value: Value of a field; only strings are checked.
        path: Dotted name of the field, for the error message.

    Raises:
        ConfigError: The string contains a NUL character or a lone surrogate. Python represents
            file names that are not UTF-8 with lone surrogates.
    """
    if not isinstance(value, str):
        return
    try:
        value.encode()
    except UnicodeEncodeError as error:
        bad = ascii(error.object[error.start])
        raise ConfigError(f"{path} = {value!a}: {bad} is not a complete character") from None
    if "\0" in value:
        raise ConfigError(f"{path} = {value!a}: it contains a NUL character")


def _check_size(value: object, path: str) -> None:
    """Raises ConfigError if a device cannot hold a number: it has 32-bit integers and float32."""
    if isinstance(value, int) and abs(value) > MAX_INTEGER:
        raise ConfigError(f"{path} = {value}: an integer must be from -2^32 + 1 to 2^32 - 1")
    if isinstance(value, float) and value != 0 and not MIN_FLOAT <= abs(value) <= MAX_FLOAT:
        raise ConfigError(
            f"{path} = {value}: it must be 0 or a number of the type float32, whose absolute value "
            "is from 1.2e-38 to 3.4e38"
        )


def _describe_type(hint: Any) -> str:
    """Returns the name of a type, or the values of a Literal, for an error message."""
    if get_origin(hint) is Literal:
        return " or ".join(map(repr, get_args(hint)))
    return hint.__name__ if isinstance(hint, type) else str(hint)
