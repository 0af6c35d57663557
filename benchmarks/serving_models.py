"""A random Llama with fine-tunes that differ from it in every weight, as checkpoints on disk, and their own judges."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from benchmarks.engine_model import SHAPES

CHAT = "{% for message in messages %}{{ message['content'] }} {% endfor %}"
LLAMAS: dict[str, dict[str, Any]] = {
    "500m": SHAPES["8b"]
    | {
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 8,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "vocab_size": 32000,
    },
    "tiny": SHAPES["tiny"],
}
_MOVED = 0.3
"""How far a fine-tune's weights are from the base's, in units of their own spread."""


def make_tokenizer(size: int) -> PreTrainedTokenizerFast:
    """``size`` words, ``t0`` to ``t<size - 1>``: text and token ids say the same. Other words are ``t0``."""
    tokenizer = Tokenizer(models.WordLevel({f"t{i}": i for i in range(size)}, unk_token="t0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=CHAT)


def make_models(folder: Path, shape: str, device: str, names: Sequence[str]) -> None:
    """Write ``base`` and one fine-tune a name to ``folder``, in bfloat16."""
    config = LlamaConfig(**LLAMAS[shape], bos_token_id=None, eos_token_id=None, tie_word_embeddings=False)
    torch.manual_seed(0)
    make: Any = LlamaForCausalLM  # its methods are wrapped without their types
    with torch.device(device):
        base = make(config).to(torch.bfloat16)
        save(base, folder / "base")
        for seed, name in enumerate(names):
            tuned = make(config).to(torch.bfloat16)
            torch.manual_seed(seed + 1)
            with torch.no_grad():
                for weight, start in zip(tuned.parameters(), base.parameters(), strict=True):
                    spread = start.float().std() if start.dim() > 1 else 0.1
                    weight.copy_(start.float() + _MOVED * spread * torch.randn(start.shape))
            save(tuned, folder / name)


def save(model: Any, path: Path) -> None:
    """A checkpoint with its tokenizer."""
    model.save_pretrained(path)
    make_tokenizer(model.config.vocab_size).save_pretrained(path)


class Judge:
    """What transformers makes of a checkpoint."""

    def __init__(self, path: Path, device: str) -> None:
        model: Any = LlamaForCausalLM.from_pretrained(path, dtype=torch.float32)
        self._model = model.to(device)

    def regret(self, prompt: Sequence[int], output: Sequence[int]) -> float:
        """How far the drawn tokens lie below the best ones at most, in units of the logits' spread."""
        with torch.inference_mode():
            ids = torch.tensor([[*prompt, *output]], device=self._model.device)
            logits = self._model(ids).logits[0, len(prompt) - 1 : -1].float()
        drawn = logits.gather(1, torch.tensor(output, device=logits.device)[:, None])[:, 0]
        return float(((logits.amax(1) - drawn) / logits.std(1)).max())
