"""Structured output: what may be asked for, compiled for a version's vocabulary, and followed token by token."""

from deltazip_ray.engine.structure.structures import Structures

__all__ = ["Structures"]
