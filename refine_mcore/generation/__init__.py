"""Text from a model: prompts are read into its state in slices, and answers drawn from it."""

from refine_mcore.generation.generate import NotFiniteError, Sampling, generate
from refine_mcore.generation.text import TextStream, response_text

__all__ = ["NotFiniteError", "Sampling", "TextStream", "generate", "response_text"]
