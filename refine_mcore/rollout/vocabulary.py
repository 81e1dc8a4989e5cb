"""How a model's logits are laid out, for the kernels that read them."""

from __future__ import annotations

from typing import Any

from refine_mcore.models.fast_weight_model import LanguageModel


def vocabulary_options(model: LanguageModel) -> dict[str, Any]:
    """`vocab_size` and `group` of the vocabulary-parallel kernels; no group, no communication."""
    group = model.tp_group if model.tp_group.size() > 1 else None
    return {"vocab_size": model.config.arch.vocab_size, "group": group}
