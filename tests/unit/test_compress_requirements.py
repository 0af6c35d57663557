"""Bounds on the quality of an artifact: how they are written, and what is said when one is not kept."""

import pytest

from deltazip_ray.artifact.manifest import Quality
from deltazip_ray.artifact.requirements import Requirement, check_quality, parse_requirements
from deltazip_ray.compress.options import CompressOptions
from deltazip_ray.errors import ConfigError, QualityTooLow

QUALITY = Quality(
    data="chats",
    block_errors={"layers.0": 0.004, "layers.1": 0.03, "layers.2": 0.01},
    kl_divergence=0.02,
    scores={"sort:exact_match": 0.9, "gsm8k:exact_match:strict-match": 0.5},
)


def test_bounds_as_people_write_them() -> None:
    assert parse_requirements("kl<0.05") == (Requirement("kl", 0.05),)
    assert parse_requirements(" block < 2% , kl<1e-3") == (Requirement("block", 0.02), Requirement("kl", 0.001))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "kl",
        "kl>1",
        "kl<",
        "kl<x",
        "kl<-1",
        "kl<0",
        "kl<1.2.3",
        "ppl<3",
        "kl<1;block<2",
        "kl<1,",
        "sort>0.9",
        "a:b<0.9",
        "a:b>0",
    ],
)
def test_what_is_no_bound_is_refused_before_any_work(text: str) -> None:
    with pytest.raises(ConfigError, match=r"cannot parse the requirement .*: write kl<0\.05, block<2% or task"):
        CompressOptions(require=text)


@pytest.mark.parametrize("text", [None, "kl<0.05", "block<4%", "kl<0.0201,block<0.0301", "sort:exact_match>89%, kl<1"])
def test_bounds_that_are_kept(text: str | None) -> None:
    check_quality(QUALITY, text)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (
            "kl<0.01",
            "the KL divergence from the fine-tune is 0.02 nats a token, not below 0.01: compress with more bits",
        ),
        ("kl<0.02", "not below 0.02"),
        ("sort:exact_match>0.9", "sort:exact_match is 0.9, not above 0.9"),
        ("gsm8k:exact_match:strict-match>0.7", "strict-match is 0.5, not above 0.7"),
        ("sort:acc>0.1", "no score sort:acc, but gsm8k:exact_match:strict-match, sort:exact_match: measure it with"),
        ("block<2%", "the relative error of layers.1 is 3.000%, not below 2%"),
        ("kl<0.05,block<0.01", "error of layers.1 is 3.000%, not below 1%"),
        ("kl<0.01,block<1%", "0.02 nats a token, not below 0.01; the relative error of layers.1"),
    ],
)
def test_a_bound_that_is_not_kept_is_named(text: str, told: str) -> None:
    with pytest.raises(QualityTooLow) as raised:
        check_quality(QUALITY, text)
    assert told in raised.value.message


def test_without_a_record_nothing_is_kept() -> None:
    check_quality(None, None)
    with pytest.raises(QualityTooLow, match="no record of its KL divergence"):
        check_quality(None, "kl<1")
    with pytest.raises(QualityTooLow, match="no record of its blocks' errors"):
        check_quality(Quality(data="none", block_errors={}), "block<1%")
