"""Structured output: structures are checked, compiled for a version's vocabulary, and followed token by token."""

from deltazip_ray.engine.structure.grammars import Vocabulary
from deltazip_ray.engine.structure.structures import Structures

__all__ = ["Structures", "Vocabulary"]
