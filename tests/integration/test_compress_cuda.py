"""The compressor on a CUDA device."""

from pathlib import Path

import pytest
import torch

from deltazip_ray.compress.calibration import load_calibration
from deltazip_ray.compress.merge import merge
from deltazip_ray.compress.options import CompressOptions
from deltazip_ray.compress.pairing import open_pair
from deltazip_ray.compress.pipeline import compress_checkpoint
from deltazip_ray.compress.runner import Runner
from deltazip_ray.compress.survey import Surveyor
from tests.support.tiny import make_base, make_finetune

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("codec", ["int4", "sparse24_int4"])
def test_cuda_is_as_good_as_the_cpu(tmp_path: Path, codec: str, tied: bool) -> None:
    base = make_base(tmp_path / "base", tied=tied)
    finetuned = make_finetune(base, tmp_path / "finetuned", added=("<new>",))
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog; " * 60)
    found = {}
    for device, dtype in (("cpu", "float32"), ("cuda", "float32"), ("cuda", "bfloat16")):
        options = CompressOptions.model_validate(
            {
                "codec": codec,
                "calibration": text,
                "samples": 16,
                "sequence_length": 64,
                "device": device,
                "dtype": dtype,
            }
        )
        out = tmp_path / f"{device}-{dtype}"
        manifest = compress_checkpoint(base, finetuned, out.as_uri(), options)
        assert manifest.quality is not None
        found[out.name] = manifest.quality.kl_divergence
        merge(base, out, tmp_path / f"merged-{out.name}")
    assert found["cuda-float32"] == pytest.approx(found["cpu-float32"], rel=0.1)
    assert found["cuda-bfloat16"] == pytest.approx(found["cpu-float32"], rel=0.5)


def test_a_target_is_met_on_cuda(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    finetuned = make_finetune(base, tmp_path / "finetuned", added=("<new>",))
    found = {}
    for device in ("cpu", "cuda"):
        options = CompressOptions.model_validate(
            {"target_ratio": 5, "samples": 16, "sequence_length": 64, "device": device}
        )
        manifest = compress_checkpoint(base, finetuned, (tmp_path / device).as_uri(), options)
        assert manifest.quality is not None
        found[device] = manifest.quality.kl_divergence
    assert found["cuda"] == pytest.approx(found["cpu"], rel=0.5)


def test_sampling_on_cuda_is_deterministic(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    finetuned = make_finetune(base, tmp_path / "finetuned")
    options = CompressOptions(samples=16, sequence_length=64, device="cuda")
    versions = {
        compress_checkpoint(base, finetuned, (tmp_path / name).as_uri(), options).version() for name in ("a", "b")
    }
    assert len(versions) == 1


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_a_survey_on_cuda_is_deterministic(tmp_path: Path, tied: bool) -> None:
    """With heads of 128 and 256 tokens, where the gradient of torch's fastest attention is another in every run."""
    base = make_base(tmp_path / "base", hidden=512, tied=tied)
    pair = open_pair(base, make_finetune(base, tmp_path / "finetuned", scale=0.005))
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog; " * 400)
    options = CompressOptions(calibration=text, samples=16, sequence_length=256, device="cuda")
    found = []
    with torch.no_grad():
        calibration = load_calibration(pair.finetuned, pair.skeleton, options, lambda fraction: None)
        for _ in range(3):
            runner = Runner(pair.skeleton, calibration, options)
            found.append(Surveyor(pair, runner, calibration, options).survey(lambda fraction: None).choices)
    assert found[1:] == found[:1] * 2
