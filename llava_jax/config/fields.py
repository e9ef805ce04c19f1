"""What a field of a config says about itself, as metadata of its type.

    rank: Annotated[int, at_least(1, "an adapter of rank 0 has no weights")]
    memory: Annotated[MemoryConfig, PLAN]

`Bound` says which values are allowed and why, `Role` what the field decides, `IGNORED_BY_PLAN` that
memory does not depend on it. Only `check_fields` and `field_paths` read this metadata.

beartype's validators (`Annotated[int, Is[...]]`) would check bounds as well, but their errors show
the code of the check instead of what the value must be and why.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

from beartype import BeartypeConf
from beartype.door import is_bearable

from llava_jax.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Role:
    """What a field decides. A field without a role has that of its group, or else `RECIPE`.

    Attributes:
        name: Name of the role.
        may_change: Whether the value may change when a run resumes.
        may_differ: Whether each process of a run may have its own value.
        is_ignored_by_plan: Whether the memory that a train step takes is independent of the value.
    """

    name: str
    may_change: bool
    may_differ: bool
    is_ignored_by_plan: bool


RECIPE = Role("recipe", may_change=False, may_differ=False, is_ignored_by_plan=False)
"""Decides what is learned."""

PLAN = Role("plan", may_change=True, may_differ=False, is_ignored_by_plan=False)
"""Decides how the run fits its devices, and never changes a result."""

OBSERVED = Role("observed", may_change=True, may_differ=False, is_ignored_by_plan=True)
"""Decides how the run is named, saved, measured and shown, and what stops it."""

RESOLVED = Role("resolved", may_change=True, may_differ=False, is_ignored_by_plan=True)
"""Is resolved into another field, which is the one that is compared."""

LOCATION = Role("location", may_change=True, may_differ=True, is_ignored_by_plan=True)
"""Says where files are. Fingerprints of weights and digests of data are compared instead."""

MACHINE = Role("machine", may_change=True, may_differ=True, is_ignored_by_plan=True)
"""Depends on what a machine offers, for example its cores."""


class IgnoredByPlan:
    """Marks a field of the recipe or the plan on which a train step's memory does not depend."""


IGNORED_BY_PLAN = IgnoredByPlan()


@dataclasses.dataclass(frozen=True)
class Bound:
    """Values that a field may have. None, where the type allows it, is not checked.

    Attributes:
        allows: Whether a value is allowed.
        text: What the value must be, as the error says it.
        reason: Why, in a few words.
    """

    allows: Callable[[Any], bool]
    text: str
    reason: str


def at_least(minimum: int, reason: str) -> Bound:
    """A number that is not smaller than `minimum`."""
    return Bound(lambda value: value >= minimum, f"at least {minimum}", reason)


@dataclasses.dataclass(frozen=True)
class Field:
    """A field of a config class, with its metadata sorted by kind.

    Attributes:
        name: Name in its class.
        type: Its type, without metadata.
        role: What it decides.
        bounds: Conditions on its value.
        is_ignored_by_plan: Whether the field, or its role, is marked so.
    """

    name: str
    type: Any
    role: Role
    bounds: tuple[Bound, ...]
    is_ignored_by_plan: bool


@functools.cache
def read_fields(config_class: type, role: Role = RECIPE) -> tuple[Field, ...]:
    """The fields of a config class, in their order; `role` is that of the whole class."""
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
    """Dotted names of the fields that `is_wanted`; a group that is wanted stands for its fields."""

    def walk(config_class: type, role: Role, prefix: str) -> Iterator[str]:
        for field in read_fields(config_class, role):
            if is_wanted(field):
                yield prefix + field.name
            elif isinstance(field.type, type) and dataclasses.is_dataclass(field.type):
                yield from walk(field.type, field.role, f"{prefix}{field.name}.")

    return frozenset(walk(config_class, RECIPE, ""))


def check_fields(config: Any, prefix: str = "") -> None:
    """Checks every field, those of nested dataclasses too, against its type and its bounds.

    Args:
        config: An instance of a dataclass.
        prefix: What the names of its fields start with in an error.

    Raises:
        ConfigError: A field has a value that its type or its bounds do not allow.
    """
    for field in read_fields(type(config)):
        path, value = prefix + field.name, getattr(config, field.name)
        check_text(value, path)
        # The constructor checks nothing by itself, and a config file may pass anything.
        if not is_bearable(value, field.type, conf=BeartypeConf(is_pep484_tower=True)):
            raise ConfigError(f"{path} = {value!r}: it must be {_describe_type(field.type)}")
        for bound in field.bounds:
            if value is not None and not bound.allows(value):
                raise ConfigError(f"{path} = {value!r}: it must be {bound.text} ({bound.reason})")
        if dataclasses.is_dataclass(value):
            check_fields(value, f"{path}.")


def check_text(value: Any, path: str) -> None:
    """Refuses text that no path, no file and no tokenizer can take.

    Raises:
        ConfigError: The text has a lone surrogate, as names of files that are not UTF-8 may have,
            or a NUL.
    """
    if not isinstance(value, str):
        return
    try:
        value.encode()
    except UnicodeEncodeError as error:
        bad = ascii(error.object[error.start])
        raise ConfigError(f"{path} = {value!a}: {bad} is not a whole character") from None
    if "\0" in value:
        raise ConfigError(f"{path} = {value!a}: it has a NUL character")


def _describe_type(hint: Any) -> str:
    """A type in words."""
    if get_origin(hint) is Literal:
        return " or ".join(map(repr, get_args(hint)))
    return hint.__name__ if isinstance(hint, type) else str(hint)
