"""Tasks: rows of a prompt, what answers it and how far to generate."""

from refine_mcore.evaluation.tasks.files import rows_of_files
from refine_mcore.evaluation.tasks.niah import VARIANTS, niah_rows
from refine_mcore.evaluation.tasks.row import Row

__all__ = ["VARIANTS", "Row", "niah_rows", "rows_of_files"]
