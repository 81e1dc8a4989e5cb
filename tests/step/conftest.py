"""The world of one rank, as the model tests have it."""

from tests.models.conftest import process_groups

__all__ = ["process_groups"]
