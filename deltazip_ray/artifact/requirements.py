"""Bounds on a version's measured quality, checked before it is written or published."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import isfinite

from deltazip_ray.artifact.manifest import Quality
from deltazip_ray.errors import ConfigError, QualityTooLow

_BOUND = re.compile(r"\s*(kl|block)\s*<\s*([0-9.eE+-]+)\s*(%?)\s*")
_SCORE = re.compile(r"\s*([^\s:<>,]+:[^\s<>,]+)\s*>\s*([0-9.eE+-]+)\s*(%?)\s*")


@dataclass(frozen=True)
class Requirement:
    """A measure and its upper bound, or a score and its lower bound."""

    measure: str
    """``kl``: divergence from the fine-tune in nats a token; ``block``: largest relative error of any block's output;
    ``task:metric``: a score."""
    limit: float

    @property
    def is_score(self) -> bool:
        """Whether higher is better."""
        return ":" in self.measure


def parse_requirements(text: str) -> tuple[Requirement, ...]:
    """Bounds as people write them, with commas between: ``kl<0.05``, ``block<2%``, ``task:metric>0.9``.

    Raises ConfigError.
    """
    return tuple(_parse(part) for part in text.split(","))


def check_quality(quality: Quality | None, text: str | None) -> None:
    """Raise QualityTooLow with all bounds that are violated; ConfigError when ``text`` cannot be parsed."""
    requirements = parse_requirements(text) if text is not None else ()
    failed = [told for told in (_failure(requirement, quality) for requirement in requirements) if told]
    if failed:
        raise QualityTooLow("; ".join(failed) + ": compress with more bits, or with calibration data closer to its use")


def _failure(requirement: Requirement, quality: Quality | None) -> str | None:
    """What is wrong, for the message; None when the bound holds."""
    if requirement.is_score:
        return _low_score(requirement, {} if quality is None else quality.scores)
    if requirement.measure == "kl":
        found = None if quality is None else quality.kl_divergence
        if found is None:
            return f"the artifact has no record of its KL divergence, which must be below {requirement.limit:g}"
        told = f"the KL divergence from the fine-tune is {found:.3g} nats a token"
    else:
        errors = {} if quality is None else quality.block_errors
        if not errors:
            return f"the artifact has no record of its blocks' errors, which must be below {requirement.limit:.3g}"
        worst = max(errors, key=errors.__getitem__)
        found = errors[worst]
        told = f"the relative error of {worst} is {found:.3%}"
    limit = f"{requirement.limit:g}" if requirement.measure == "kl" else f"{100 * requirement.limit:g}%"
    return None if found < requirement.limit else f"{told}, not below {limit}"


def _low_score(requirement: Requirement, scores: Mapping[str, float]) -> str | None:
    found = scores.get(requirement.measure)
    if found is None:
        return (
            f"the artifact has no score {requirement.measure}, but {', '.join(sorted(scores)) or 'none at all'}: "
            "measure it with `deltazip eval --record`"
        )
    return (
        None if found > requirement.limit else f"{requirement.measure} is {found:.4g}, not above {requirement.limit:g}"
    )


def _parse(part: str) -> Requirement:
    match = _BOUND.fullmatch(part) or _SCORE.fullmatch(part)
    try:
        limit = float(match.group(2)) if match else 0.0
    except ValueError:
        limit = 0.0
    if match is None or limit <= 0 or not isfinite(limit):
        raise ConfigError(
            f"cannot parse the requirement {part.strip()!r}: write kl<0.05, block<2% or task:metric>0.9, "
            "separated by commas"
        )
    return Requirement(match.group(1), limit / 100 if match.group(3) else limit)
