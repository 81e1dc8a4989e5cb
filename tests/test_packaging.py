"""The layout of the repository as Python's import system sees it."""

from importlib.machinery import PathFinder
from pathlib import Path


def test_kernels_folder_does_not_shadow_the_kernels_library(tmp_path: Path) -> None:
    """transformers imports a library of that name; the repository may come first on the path."""
    library = tmp_path / "kernels" / "__init__.py"
    library.parent.mkdir()
    library.touch()
    repository = Path(__file__).parent.parent
    spec = PathFinder.find_spec("kernels", [str(repository), str(tmp_path)])
    assert spec is not None
    assert spec.origin == str(library)
