"""Run configuration: typed dataclasses <- YAML file <- dotted overrides, every mistake a
one-sentence `UserError`.

`schema` says what can be set, `loader` is the generic machinery, `checks` holds what one field
cannot say alone.
"""

from refine_mcore.config.checks import (
    data_parallel_layout,
    require_data,
    rollout_micro_batches,
    runs_in_slices,
    validate,
)
from refine_mcore.config.loader import config_from_dict, flatten, load_config, save_config, to_dict
from refine_mcore.config.run_directory import (
    TOKENS,
    claim_run_directory,
    prepare_run_directory,
    require_claim,
)
from refine_mcore.config.schema import (
    CheckpointConfig,
    Config,
    DataConfig,
    EvaluationConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    PosttrainConfig,
    RefineConfig,
    RunConfig,
    TrainingConfig,
    TTTConfig,
)

__all__ = [
    "TOKENS",
    "CheckpointConfig",
    "Config",
    "DataConfig",
    "EvaluationConfig",
    "ModelConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "PosttrainConfig",
    "RefineConfig",
    "RunConfig",
    "TTTConfig",
    "TrainingConfig",
    "claim_run_directory",
    "config_from_dict",
    "data_parallel_layout",
    "flatten",
    "load_config",
    "prepare_run_directory",
    "require_claim",
    "require_data",
    "rollout_micro_batches",
    "runs_in_slices",
    "save_config",
    "to_dict",
    "validate",
]
