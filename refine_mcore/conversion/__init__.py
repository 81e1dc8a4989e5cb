"""Hugging Face checkpoints in and out of Megatron `torch_dist` checkpoints.

What is exported here needs neither torch nor Megatron, so that a bad input is refused at once;
`importing`, `exporting` and `torch_dist` do the moving of tensors.
"""

from refine_mcore.conversion.hf_config import architecture_from_hf, hf_config
from refine_mcore.conversion.parameters import (
    HFParameter,
    Part,
    checkpoint_shapes,
    hf_parameter_map,
    to_hf_tensors,
)

__all__ = [
    "HFParameter",
    "Part",
    "architecture_from_hf",
    "checkpoint_shapes",
    "hf_config",
    "hf_parameter_map",
    "to_hf_tensors",
]
