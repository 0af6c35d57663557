"""Continuous batching across versions."""
