"""What a JSON or YAML file must hold, said as types: one checker for every reader. Needs no torch."""

import functools
import json
import re
import types
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

from errors import one_line

LARGEST = 2**63  # what counts and steps are kept in
_NO_TEXT = re.compile("[\ud800-\udc7f\udd00-\udfff]")  # halves of characters, but for bytes in file names
_NAMES = {
    int: "an integer",
    float: "a number",
    str: "a string",
    bool: "true or false",
    list: "a list",
    dict: "an object",
    type(None): "nothing",
}
# Beside its own errors yaml lets through what Python says of a value that does not fit its tag.
_YAML_ERRORS = (ValueError, LookupError, TypeError, AttributeError, ArithmeticError)


class MalformedError(ValueError):
    """A file does not hold what its reader needs. The message is the reason, in one line."""


def read_json(path: Path, kind: Any = dict) -> Any:
    """The content of a JSON file.

    Args:
        path: of the file.
        kind: what it must hold, as :func:`check` takes it.

    Raises:
        OSError: it is not there or cannot be read.
        MalformedError: it is not JSON, or holds something else.
    """
    return parse_json(Path(path).read_bytes(), kind)


def parse_json(data: bytes | str, kind: Any = dict) -> Any:
    """As :func:`read_json`, of a file's content."""
    return _parse(json.loads, data, kind, (ValueError,))


def parse_yaml(data: bytes | str, kind: Any = dict) -> Any:
    """As :func:`parse_json`, of YAML; nothing at all is None."""
    import yaml

    return _parse(yaml.safe_load, data, kind, (yaml.YAMLError, *_YAML_ERRORS))


def check(value: Any, kind: Any, where: str = "", exact: bool = False) -> None:
    """Refuse a value of another type.

    Args:
        value: of JSON's or YAML's types.
        kind: a type, ``list[…]``, ``dict[str, …]``, a union, ``Any``, or a TypedDict: an object that has at least these
            keys, where those that may be None may be missing. A number may be an integer, which a truth value is not.
        where: what the value is called in the message.
        exact: an object of a TypedDict has no other keys: for files that people write, where a misspelt key would be
            as good as absent.

    Raises:
        MalformedError: the first place that does not fit.
    """
    if kind is Any:
        return
    origin, inner = typing.get_origin(kind) or kind, typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        _check_union(value, inner, where, exact)
    elif typing.is_typeddict(kind):
        check(value, dict, where)
        if exact and (unknown := sorted(set(map(str, value)) - set(_hints(kind)))):
            raise MalformedError(f"{where or 'it'}: {unknown[0]} is not known; there are {', '.join(_hints(kind))}")
        for name, of in _hints(kind).items():
            if name in value:
                check(value[name], of, f"{where}.{name}" if where else name, exact)
            elif type(None) not in typing.get_args(of):
                raise MalformedError(f"{where or 'it'} has no {name}")
    elif not _is(value, origin):
        raise MalformedError(f"{where or 'it'} is {_short(value)}, not {_NAMES[origin]}")
    elif origin is list and inner:
        for number, each in enumerate(value):
            check(each, inner[0], f"{where}[{number}]", exact)
    elif origin is dict and inner:
        for key, each in value.items():
            check(key, inner[0], f"{where or 'it'}: the key {_short(key)}")
            check(each, inner[1], f"{where}.{key}" if where else key, exact)


def _parse(load: Callable, data: bytes | str, kind: Any, errors: tuple[type[Exception], ...]) -> Any:
    try:
        value = load(data)
        check(value, kind)
    except RecursionError:
        raise MalformedError("it is nested too deeply, or contains itself") from None
    except MalformedError:
        raise
    except errors as error:
        raise MalformedError(one_line(error)) from error
    return value


def _check_union(value: Any, kinds: tuple, where: str, exact: bool) -> None:
    faults = []
    for kind in kinds:
        try:
            return check(value, kind, where, exact)
        except MalformedError as fault:
            if kind is not type(None):
                faults.append((kind, fault))
    if len(faults) == 1:
        raise faults[0][1]
    names = " or ".join(_name(kind) for kind, _ in faults)
    raise MalformedError(f"{where or 'it'} is {_short(value)}, not {names}")


def _is(value: Any, kind: type) -> bool:
    if kind is int:
        return type(value) is int and abs(value) < LARGEST
    if kind is float:
        return type(value) is float or _is(value, int)
    if kind is str:
        return isinstance(value, str) and not _NO_TEXT.search(value)
    return isinstance(value, kind)


@functools.cache
def _hints(kind: type) -> dict[str, Any]:
    return typing.get_type_hints(kind)


def _name(kind: Any) -> str:
    return _NAMES[dict if typing.is_typeddict(kind) else typing.get_origin(kind) or kind]


def _short(value: Any) -> str:
    """A value in a message: of a container its type alone."""
    if isinstance(value, dict | list):
        return _NAMES[type(value)]
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}…"
