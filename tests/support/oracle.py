"""What transformers makes of a checkpoint: the oracle of the engine's tests."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM


def load_model(path: Path, dtype: torch.dtype = torch.float32) -> Any:
    """A checkpoint under transformers."""
    config = AutoConfig.from_pretrained(path)
    # Some releases choose an attention for Gemma 2 that leaves the soft caps out.
    attention = "eager" if config.model_type == "gemma2" else "sdpa"
    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype, attn_implementation=attention)


class Oracle:
    """One checkpoint under transformers."""

    def __init__(self, path: Path, dtype: torch.dtype = torch.float32) -> None:
        self.model = load_model(path, dtype)
        self.model.generation_config.eos_token_id = None  # Generate to the end, as the engine does without stop tokens.

    def logits(self, tokens: Sequence[int]) -> torch.Tensor:
        """Float32 ``[tokens, vocab]``."""
        with torch.inference_mode():
            return self.model(torch.tensor([list(tokens)])).logits[0].float()

    def greedy(self, prompt: Sequence[int], count: int) -> list[int]:
        """``count`` tokens, whatever they are."""
        ids = torch.tensor([list(prompt)])
        with torch.inference_mode():
            out = self.model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=count,
                do_sample=False,
                pad_token_id=0,
            )
        return out[0, len(prompt) :].tolist()
