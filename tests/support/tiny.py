"""Tiny random Llama checkpoints with a real tokenizer: no training, made in a second.

A fine-tune moves every weight of its base, embeddings, norms and head included.
"""

from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

ALPHABET = "abcdefghijklmnopqrstuvwxyz0123456789 +-=.,:;!?<>|()[]{}'\n" + "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
CHAT = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def make_tokenizer(alphabet: str = ALPHABET) -> PreTrainedTokenizerFast:
    """One token a character, plus ``<bos>``, ``<eos>`` and ``<unk>``."""
    vocab = {token: i for i, token in enumerate(["<unk>", "<bos>", "<eos>", *alphabet])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", unk_token="<unk>", chat_template=CHAT
    )


def make_base(
    path: Path, *, seed: int = 0, tied: bool = False, hidden: int = 128, layers: int = 2, alphabet: str = ALPHABET
) -> Path:
    """Write a random base checkpoint and its tokenizer to ``path``; returns it."""
    tokenizer = make_tokenizer(alphabet)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=2 * hidden + 64,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=tied,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        initializer_range=0.1,
    )
    LlamaForCausalLM(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def make_finetune(
    base: Path,
    path: Path,
    *,
    seed: int = 1,
    scale: float = 0.02,
    added: tuple[str, ...] = (),
    template: str | None = None,
) -> Path:
    """Write a full-parameter fine-tune of ``base``: every weight moved by noise of std ``scale``."""
    model = LlamaForCausalLM.from_pretrained(base, dtype=torch.float32)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(base)
    if added:
        tokenizer.add_tokens(list(added))
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += scale * torch.randn(parameter.shape, generator=generator)
    if template is not None:
        tokenizer.chat_template = template
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path
