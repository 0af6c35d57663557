"""LoRA adapters in PEFT's format, written without PEFT."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

QKVO = tuple(f"self_attn.{part}_proj" for part in "qkvo")


def make_adapter(
    base: Path,
    path: Path,
    *,
    rank: int = 4,
    ranks: dict[str, int] | None = None,
    modules: tuple[str, ...] = QKVO,
    replaced: dict[str, Tensor] | None = None,
    seed: int = 3,
    **settings: Any,
) -> Path:
    """Write random products for ``modules`` of every block; ``ranks`` by ending of the name, ``settings`` as given."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {f"base_model.model.{name}": value for name, value in (replaced or {}).items()}
    for name, weight in load_file(base / "model.safetensors").items():
        module = name.removesuffix(".weight")
        if module.endswith(modules):
            own = next((r for end, r in (ranks or {}).items() if module.endswith(end)), rank)
            down = 0.05 * torch.randn(own, weight.shape[1], generator=generator)
            up = 0.05 * torch.randn(weight.shape[0], own, generator=generator)
            tensors[f"base_model.model.{module}.lora_A.weight"] = down
            tensors[f"base_model.model.{module}.lora_B.weight"] = up
    path.mkdir()
    save_file(tensors, path / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base),
        "r": rank,
        "lora_alpha": 2 * rank,
        "lora_dropout": 0.05,
        "target_modules": sorted(modules),
        "bias": "none",
        "use_dora": False,
        "use_rslora": False,
        "fan_in_fan_out": False,
        "modules_to_save": None,
    }
    (path / "adapter_config.json").write_text(json.dumps(config | settings))
    return path
