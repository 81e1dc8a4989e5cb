"""Settings of a Hugging Face `config.json`, read and written by tables."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from refine_mcore.errors import UserError

_REQUIRED = object()
_NUMBER_LIMIT = 2**40  # larger, infinite or undefined numbers are nobody's sizes or rates
_KIND_NAMES = {int: "a whole number", float: "a number", bool: "true or false", str: "a string"}


def _same(value: Any) -> Any:
    return value


@dataclass(frozen=True)
class Key:
    """One HF setting: its name, our field, its type, its default, and how values translate."""

    name: str
    field: str
    kind: Any  # the type itself
    default: Any = _REQUIRED
    nullable: bool = False
    read: Callable[[Any], Any] = _same
    write: Callable[[Any], Any] = _same


class Refused(UserError):
    """Already names the file: not to be prefixed again."""


def read_settings(config: dict[str, Any], keys: tuple[Key, ...], source: str) -> dict[str, Any]:
    """Our fields by name. Raises Refused on a missing or mistyped setting."""
    return {key.field: key.read(read_setting(config, key, source)) for key in keys}


def write_settings(keys: tuple[Key, ...], described: object) -> dict[str, Any]:
    """The inverse of `read_settings`: settings by HF name, of the fields of `described`."""
    return {key.name: key.write(getattr(described, key.field)) for key in keys}


def read_setting(config: dict[str, Any], key: Key, source: str) -> Any:
    """One setting, checked."""
    value = config.get(key.name, key.default)
    if value is _REQUIRED:
        raise Refused(f"{source}: {key.name} is missing")
    if value is None and key.nullable:
        return None
    if type(value) is not key.kind and not (key.kind is float and type(value) is int):
        raise Refused(f"{source}: {key.name} must be {_KIND_NAMES[key.kind]}, got {value!r}")
    if key.kind in (int, float) and not abs(value) < _NUMBER_LIMIT:  # NaN is not less either
        raise Refused(f"{source}: {key.name} {value!r} is out of range")
    return key.kind(value)


# Settings that have no say in what a model computes from tokens: names of classes and files, ids of
# tokens, how kernels run, how weights are drawn and what only training or generation reads.
_WITHOUT_A_SAY = frozenset(
    {
        *(
            "architectures",
            "auto_map",
            "model_type",
            "transformers_version",
            "dtype",
            "torch_dtype",
        ),
        *("bos_token_id", "eos_token_id", "pad_token_id", "max_position_embeddings", "use_cache"),
        *(
            "attn_mode",
            "fp32_states",
            "last_layer_fuse_norm",
            "mamba_ssm_dtype",
            "use_fused_kernel",
        ),
        *("linear_a_log_max", "linear_a_log_min", "linear_dt_init_floor", "linear_dt_max"),
        *("linear_dt_min", "use_l2warp"),
        *("use_output_norm",),  # of DeltaNet, whose class does not read it either
        *("mtp_num_hidden_layers", "mtp_use_dedicated_embeddings"),  # beside the text's own pass
    }
)


def unread_settings(config: dict[str, Any], known: Iterable[str]) -> list[str]:
    """Names of what a config sets (to no null, false, zero or empty list) that is not `known` to be
    read, and not known to have no say in what the model computes."""
    known = _WITHOUT_A_SAY.union(known)
    return [
        name
        for name, value in config.items()
        if value and name not in known and not name.startswith(("_", "fuse_"))
    ]


def refuse_unsupported(
    config: dict[str, Any], supported: dict[str, tuple[Any, ...]], source: str
) -> None:
    """Raise Refused where a setting has a value that is not one of those `supported`."""
    for name, values in supported.items():
        if name in config and config[name] not in values:
            only = " or ".join(repr(value) for value in values)
            raise Refused(f"{source}: {name} {config[name]!r} is not supported, only {only}")
