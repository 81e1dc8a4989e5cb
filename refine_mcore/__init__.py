"""refine-mcore: ReFINE training of fast-weight language models on Megatron-Core."""

import warnings

# megatron-core warns on import that Transformer Engine and Apex are absent, and about a default of
# its own configuration. Both packages are optional, and programs of this project promise that an
# error message stands alone on stderr. Here, because it must precede Megatron's first import.
for _message in (
    "Apex is not installed",
    "Transformer Engine and Apex are not installed",
    "full scope is deprecated",
):
    warnings.filterwarnings("ignore", message=_message, category=UserWarning)
