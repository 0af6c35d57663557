"""Sampling. The draw of a row depends on its logits, its request and its output position, and on nothing else."""

from deltazip_ray.engine.sampling.batch import SampledTokens, SamplingBatch, StepDraws, sample
from deltazip_ray.engine.sampling.draw import Draw
from deltazip_ray.engine.sampling.prompts import PromptScores

__all__ = ["Draw", "PromptScores", "SampledTokens", "SamplingBatch", "StepDraws", "sample"]
