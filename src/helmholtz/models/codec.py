"""Configs from plain values: what JSON, YAML and a command line give, checked by name."""

import inspect
import types
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, Literal

from helmholtz._checks import check, check_choice, check_keys


def config_from_dict(cls: type, values: Any, name: str) -> Any:
    """A config of class ``cls``, nested ones included.

    Where a field may be one of several configs, the value's ``kind`` says which.

    Args:
        name: of the config in messages.

    Raises: ValueError for an unknown key, naming the nearest one, or a value that the config refuses.
    """
    check(isinstance(values, Mapping), name, values, "a mapping of names to values")
    known = [f.name for f in fields(cls)]
    check_keys(name, values, known)
    for field in fields(cls):
        is_wanted = field.default is MISSING and field.default_factory is MISSING
        if is_wanted and field.name not in values:
            raise ValueError(f"{name}: {field.name} is missing")
    hints = typing.get_type_hints(cls)
    built = {key: _value(hints[key], value, f"{name}.{key}") for key, value in values.items()}
    try:
        return cls(**built)
    except TypeError as error:
        raise ValueError(f"{name}: {error}") from error
    except ValueError as error:
        if "." not in name:
            raise
        raise ValueError(f"{name}: {error}") from error  # which of the configs inside, as it does not know


def _value(hint: Any, value: Any, name: str) -> Any:
    """``value`` as the field's type wants it: JSON knows neither nested configs nor tuples, nor which words exist."""
    union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    options = typing.get_args(hint) if union else (hint,)
    if value is None and type(None) in options:
        return None
    nested = [cls for option in options if is_dataclass(option) for cls in _concrete(option)]
    if nested:
        return config_from_dict(_kind(nested, value, name), value, name)
    items = [typing.get_args(option)[0] for option in options if typing.get_origin(option) is tuple]
    if items and isinstance(value, list | tuple):
        return tuple(_value(items[0], item, f"{name}[{i}]") for i, item in enumerate(value))
    words = [w for option in options if typing.get_origin(option) is Literal for w in typing.get_args(option)]
    if words and isinstance(value, str):
        check_choice(name, value, words)
    check(not items or isinstance(value, str), name, value, "a list")
    return value


def _concrete(cls: Any) -> Iterable[Any]:
    """The class, or of an abstract one those that are derived from it; of a class defined again the last."""
    if not inspect.isabstract(cls):
        return [cls]
    concrete = [found for found in _derived(cls) if not inspect.isabstract(found)]
    return {(found.__module__, found.__qualname__): found for found in concrete}.values()


def _derived(cls: Any) -> Iterator[Any]:
    for child in cls.__subclasses__():
        yield child
        yield from _derived(child)


def _kind(classes: Sequence[Any], values: Any, name: str) -> type:
    """The class among several that ``values["kind"]`` names; the only one without asking."""
    if len(classes) == 1:
        return typing.cast(type, classes[0])
    check(isinstance(values, Mapping), name, values, "a mapping of names to values")
    kinds = dict[str, Any]()
    for cls in classes:  # a kind of the library's is not taken over
        kinds.setdefault(str(next(f.default for f in fields(cls) if f.name == "kind")), cls)
    check("kind" in values, f"{name}.kind", "none", f"one of {', '.join(kinds)}")
    check_choice(f"{name}.kind", values["kind"], kinds)
    return typing.cast(type, kinds[values["kind"]])
