"""From YAML and dotted overrides to a typed `Config`, and back. Knows types, not the meaning of any
field.

YAML 1.1 reads `1e-6` as a string: a string that spells a number is accepted where a float is
wanted. Nothing else is converted: `true` is no number and 3.0 is no integer. A section left empty
means its defaults.
"""

from __future__ import annotations

import difflib
import math
import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

from refine_mcore.config.checks import validate
from refine_mcore.config.schema import Config, Limit
from refine_mcore.errors import UserError
from refine_mcore.files import written_whole

_TYPE_NAMES = {bool: "true or false", int: "an integer", float: "a number", str: "a string"}


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """The validated configuration of the YAML file `path` with `section.key=value` overrides
    applied in order.

    Override values are YAML (`null`, `[a, b]`); for a string field anything that YAML reads
    otherwise is taken as typed. Raises UserError for an unreadable file, bad YAML, an unknown key,
    a wrong type and an impossible value.
    """
    return config_from_dict(_read_yaml(Path(path)), str(path), overrides)


def config_from_dict(data: Mapping[str, Any], source: str, overrides: Sequence[str] = ()) -> Config:
    """The validated configuration of plain data, with overrides as in `load_config`; `source` names
    its origin in errors."""
    config = _build(data, source)
    for override in overrides:
        config = _override(config, override)
    validate(config, source)
    return config


def to_dict(config: Config) -> dict[str, Any]:
    """Plain data (tuples as lists); `config_from_dict` makes an equal configuration of it."""
    return {
        section: {
            key: list(value) if isinstance(value, tuple) else value for key, value in body.items()
        }
        for section, body in asdict(config).items()
    }


def save_config(config: Config, path: str | Path) -> None:
    """Writes the configuration as YAML, by rename. Raises UserError if that fails."""
    with written_whole(Path(path)) as partial:
        partial.write_text(yaml.safe_dump(to_dict(config), sort_keys=False), encoding="utf-8")


class _UniqueKeyLoader(yaml.SafeLoader):
    """SafeLoader that refuses a key given twice: YAML would silently drop the first."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                continue
            if key_node.value in seen:
                raise yaml.MarkedYAMLError(
                    problem=f"key {key_node.value!r} given twice", problem_mark=key_node.start_mark
                )
            seen.add(key_node.value)
        return super().construct_mapping(node, deep)


def _parse_yaml(text: str, where: str) -> Any:
    try:
        return yaml.load(text, Loader=_UniqueKeyLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        problem = getattr(error, "problem", None) or "unreadable"
        place = f" at line {mark.line + 1}" if mark else ""
        raise UserError(f"{where}: not valid YAML{place}: {problem}") from None


def _read_yaml(path: Path) -> Any:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot read the configuration {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: not valid YAML: the file is not UTF-8 text") from None
    return _parse_yaml(text, str(path))


@cache
def _hints(cls: type) -> dict[str, Any]:
    return get_type_hints(cls, include_extras=True)


def _known_keys() -> Iterator[str]:
    for name, section in _hints(Config).items():
        yield name
        for key in _hints(section):
            yield f"{name}.{key}"


def _unknown(dotted: str, source: str) -> UserError:
    nearest = difflib.get_close_matches(dotted, list(_known_keys()), n=1, cutoff=0.0)[0]
    return UserError(f"{source}: unknown key {dotted}, the nearest known one is {nearest}")


def _build(data: Any, source: str) -> Config:
    if data is None:
        data = {}
    if not isinstance(data, Mapping):
        raise UserError(f"{source}: must hold a mapping of sections, got {_describe(data)}")
    sections = {}
    for name, body in data.items():
        if name not in _hints(Config):
            raise _unknown(str(name), source)
        if body is None:
            body = {}
        if not isinstance(body, Mapping):
            raise UserError(f"{source}: {name} must be a section with keys, got {_describe(body)}")
        cls = _hints(Config)[name]
        values = {}
        for key, value in body.items():
            if key not in _hints(cls):
                raise _unknown(f"{name}.{key}", source)
            values[key] = _convert(value, _hints(cls)[key], f"{source}: {name}.{key}")
        sections[name] = cls(**values)
    return Config(**sections)


def _override(config: Config, override: str) -> Config:
    """`config` with `section.key=value`; `section.key.name=value` sets an entry of a mapping."""
    source = f"override {override!r}"
    dotted, equals, text = override.partition("=")
    if not equals:
        raise UserError(f"{source}: must have the form section.key=value")
    name, _, rest = dotted.partition(".")
    key, _, entry = rest.partition(".")
    annotation = _hints(_hints(Config)[name]).get(key) if name in _hints(Config) else None
    if annotation is None or (entry and get_origin(annotation) is not dict):
        raise _unknown(dotted, source)
    section: Any = getattr(config, name)
    value = _override_value(text, annotation, source)
    if entry:
        value = {**getattr(section, key), entry: value}
    converted = _convert(value, annotation, f"{source}: {name}.{key}")
    changed: dict[str, Any] = {name: replace(section, **{key: converted})}
    return replace(config, **changed)


def _override_value(text: str, annotation: Any, source: str) -> Any:
    if annotation not in (str, str | None):
        return _parse_yaml(text, source)
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        return text
    return value if value is None or isinstance(value, str) else text


def _convert(value: Any, annotation: Any, where: str) -> Any:
    """`value` as `annotation` wants it, or UserError naming `where` ("FILE: section.key")."""
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _limited(_convert(value, args[0], where), args[1:], where)
    if origin in (Union, types.UnionType):  # the schema has `X | None` only
        if value is None:
            return None
        return _convert(value, next(a for a in args if a is not types.NoneType), where)
    if origin is Literal:
        if value not in args:
            choices = ", ".join(map(str, args))
            raise UserError(f"{where} must be one of {choices}, got {_describe(value)}")
        return value
    if origin is tuple:
        return _convert_list(value, args, where)
    if origin is dict:
        if not isinstance(value, Mapping):
            raise UserError(f"{where} must be a mapping, got {_describe(value)}")
        return flatten(value)
    return _convert_scalar(value, annotation, where)


def _convert_list(value: Any, args: tuple[Any, ...], where: str) -> tuple[Any, ...]:
    if not isinstance(value, (list, tuple)):
        raise UserError(f"{where} must be a list, got {_describe(value)}")
    kinds = (args[0],) * len(value) if args[-1] is Ellipsis else args
    if len(value) != len(kinds):
        raise UserError(f"{where} must be a list of {len(kinds)} values, got {len(value)}")
    return tuple(
        _convert(item, kind, f"{where}[{i}]")
        for i, (item, kind) in enumerate(zip(value, kinds, strict=True))
    )


def _convert_scalar(value: Any, kind: type, where: str) -> Any:
    if kind is float and isinstance(value, (int, float, str)) and not isinstance(value, bool):
        try:
            number = float(value)
        except (ValueError, OverflowError):
            number = math.nan
        if math.isfinite(number):
            return number
    elif isinstance(value, kind) and (kind is bool or not isinstance(value, bool)):
        return value
    raise UserError(f"{where} must be {_TYPE_NAMES[kind]}, got {_describe(value)}")


def _limited(value: Any, limits: tuple[Limit, ...], where: str) -> Any:
    for limit in limits:
        if not limit.holds(value):
            raise UserError(f"{where} must be {limit.text}, got {value}")
    return value


def flatten(mapping: Mapping[Any, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one level of dotted names, as overrides spell them."""
    flat: dict[str, Any] = {}
    for key, value in mapping.items():
        name = f"{prefix}{key}"
        flat.update(flatten(value, f"{name}.") if isinstance(value, Mapping) else {name: value})
    return flat


def _describe(value: Any) -> str:
    if value is None:
        return "nothing (null)"
    if isinstance(value, Mapping):
        return "a mapping"
    if isinstance(value, (list, tuple)):
        return "a list"
    return str(value).lower() if isinstance(value, bool) else repr(value)
