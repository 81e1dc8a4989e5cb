"""The small models and their world of one rank, as the model tests have them."""

from tests.models.conftest import _short_chunks, model_of, process_groups

__all__ = ["_short_chunks", "model_of", "process_groups"]
