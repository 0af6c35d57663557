"""How much is trained and measured: settings only. Knows no torch."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Phase:
    """One training: AdamW, the rate climbing over the first ``warmup`` steps and falling to zero over the last 60 %."""

    batch: int
    length: int
    """Tokens of a sequence."""
    peak_lr: float
    warmup: int
    steps: int


@dataclass(frozen=True)
class Scale:
    """One size of the whole experiment."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    vocab: int
    corpus_bytes: int
    tokenizer_bytes: int
    skills: int
    """Examples of the skills that the base is taught."""
    pretrain: Phase
    finetune: Phase
    adapter: Phase
    distil: Phase
    """Of the scales of the 1-bit baseline."""
    questions: int
    """Held-out questions of each task."""
    windows: int
    """Held-out pieces of text, of ``pretrain.length`` tokens."""
    calibration: int
    """Chats that each compression looks at."""


FULL = Scale(
    layers=12,
    hidden=1024,
    intermediate=2816,
    heads=16,
    kv_heads=4,
    vocab=8192,
    corpus_bytes=40_000_000,
    tokenizer_bytes=8_000_000,
    skills=80_000,
    pretrain=Phase(batch=32, length=512, peak_lr=1.2e-3, warmup=60, steps=1100),
    finetune=Phase(batch=128, length=64, peak_lr=3e-4, warmup=20, steps=300),
    adapter=Phase(batch=128, length=64, peak_lr=1.5e-3, warmup=20, steps=300),
    distil=Phase(batch=32, length=64, peak_lr=1e-2, warmup=5, steps=60),
    questions=500,
    windows=32,
    calibration=512,
)
"""152 million parameters; embedding and head take a ninth of them, as in an 8B model."""
TINY = Scale(
    layers=2,
    hidden=256,
    intermediate=256,
    heads=4,
    kv_heads=2,
    vocab=512,
    corpus_bytes=400_000,
    tokenizer_bytes=200_000,
    skills=400,
    pretrain=Phase(batch=4, length=64, peak_lr=1e-3, warmup=2, steps=20),
    finetune=Phase(batch=8, length=128, peak_lr=5e-4, warmup=2, steps=20),
    adapter=Phase(batch=4, length=128, peak_lr=1e-3, warmup=2, steps=4),
    distil=Phase(batch=4, length=128, peak_lr=1e-2, warmup=1, steps=3),
    questions=8,
    windows=2,
    calibration=12,
)
"""For trying the program: learns nothing."""
SCALES = {"full": FULL, "tiny": TINY}
