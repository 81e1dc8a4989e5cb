"""The small models' world of one rank, as the model tests have it."""

from tests.models.conftest import _short_chunks, process_groups

__all__ = ["process_groups", "_short_chunks"]
