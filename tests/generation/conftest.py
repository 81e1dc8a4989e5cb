"""The small models of tests/models, built once for a file of tests."""

from tests.models.conftest import model_of, process_groups

__all__ = ["model_of", "process_groups"]
