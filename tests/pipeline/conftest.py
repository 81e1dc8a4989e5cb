"""The small models' world of one rank, as the model tests have it."""

from tests.models.conftest import process_groups, short_chunks

__all__ = ["process_groups", "short_chunks"]
