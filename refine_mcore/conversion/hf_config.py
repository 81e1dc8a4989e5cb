"""Hugging Face `config.json` <-> `Architecture`.

Settings that change only how a kernel runs (`fuse_*`, `attn_mode`, `use_fused_kernel`,
`fp32_states`) are ignored. Settings that would change the function and that this project does not
compute are refused; those that nobody here has heard of, an import names. A setting that the
tensors cannot confirm and that has no settled default (LaCT's `use_muon`, for one) must be in the
file: a wrong guess would load without any error.
"""

from __future__ import annotations

import re
from typing import Any

from refine_mcore.conversion.fla_config import FLA_FAMILIES, FlaFamily
from refine_mcore.conversion.hybrid_config import HYBRID_FAMILIES, HybridFamily
from refine_mcore.conversion.settings import Refused
from refine_mcore.errors import UserError
from refine_mcore.models.architecture import Architecture

_FAMILIES: dict[str, FlaFamily | HybridFamily] = {**FLA_FAMILIES, **HYBRID_FAMILIES}
_OURS = ("muon_dtype",)  # of a mixer: no config has a place for it


def architecture_from_hf(config: dict[str, Any], source: str) -> Architecture:
    """The `Architecture` that an HF `config.json` describes.

    `source` names the file in error messages. Raises UserError on an unknown `model_type`, a
    missing or mistyped setting, one this project does not compute, and sizes that do not fit.
    """
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in _FAMILIES:
        raise UserError(
            f"{source}: unknown model_type {model_type!r}, known: {', '.join(_FAMILIES)}"
        )
    if config.get("quantization_config") is not None:
        raise UserError(
            f"{source}: it has a quantization_config, and quantized weights are not supported: "
            "convert the original model, or one with the weights restored"
        )
    family = _FAMILIES[model_type]
    try:
        return family.read(config, source)
    except Refused as refused:
        raise UserError(str(refused)) from None
    except UserError as error:
        message = str(error)
        for ours, theirs in family.names:
            message = re.sub(rf"\b{ours}\b", theirs, message)
        raise UserError(f"{source}: {message}") from None


def settings_not_read(config: dict[str, Any]) -> list[str]:
    """Settings of a config.json, that `architecture_from_hf` has accepted, which nothing here reads
    and which may be ones that the model was trained with: newer than this project."""
    return _FAMILIES[config["model_type"]].unread(config)


def hf_config(architecture: Architecture, model_type: str | None = None) -> dict[str, Any]:
    """A `config.json` for `architecture`; `architecture_from_hf` is its inverse.

    `model_type` says of which kind, if several can hold it. LaCT's `muon_dtype` is ours alone and
    has no place in it. Raises UserError if there is no kind that can hold the architecture.
    """
    model_type = model_type or model_type_of(architecture)
    if model_type is None or not _holds(model_type, architecture):
        lacks = f"model_type {model_type} lacks some of" if model_type else "no model_type has"
        raise UserError(f"no config.json can be written: {lacks} this architecture's options")
    return _FAMILIES[model_type].write(architecture, model_type)


def model_type_of(architecture: Architecture) -> str | None:
    """The first HF model type whose config can say all that `architecture` says."""
    return next((name for name in _FAMILIES if _holds(name, architecture)), None)


def _holds(model_type: str, architecture: Architecture) -> bool:
    family = _FAMILIES[model_type]
    if family.options is not type(architecture.mixer):
        return False
    if isinstance(family, HybridFamily) and architecture.attention is None:
        return False
    config = family.write(architecture, model_type)
    try:
        found = architecture_from_hf(config, "config.json")
    except UserError:
        return False
    return _said(found) == _said(architecture)


def _said(architecture: Architecture) -> dict[str, Any]:
    said = architecture.to_dict()
    for name in _OURS:
        said["mixer"].pop(name, None)
    return said
