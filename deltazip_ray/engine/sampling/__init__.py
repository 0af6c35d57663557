"""Drawing tokens. What a row draws depends on its logits, its request and its output position, and nothing else."""

from deltazip_ray.engine.sampling.batch import SampledTokens, SamplingBatch, sample
from deltazip_ray.engine.sampling.draw import Draw

__all__ = ["Draw", "SampledTokens", "SamplingBatch", "sample"]
