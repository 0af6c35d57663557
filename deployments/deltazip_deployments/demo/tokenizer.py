"""A tokenizer with one token per character, and whole words for the instructions."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from deltazip_deployments.demo.tasks import CHAT, INSTRUCTIONS, LETTERS, Task

BOS, EOS, UNKNOWN = "<bos>", "<eos>", "<unk>"
ROLES = ("<|system|>", "<|user|>", "<|assistant|>")
_MARK = "\0"
CHARACTERS = LETTERS + "0123456789 +-*/=.,:;?!'()[]#\n"


def make_tokenizer() -> PreTrainedTokenizerFast:
    """The base's tokenizer."""
    vocabulary = {token: i for i, token in enumerate([UNKNOWN, BOS, EOS, *ROLES, *INSTRUCTIONS, *CHARACTERS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[A-Z][a-z]+|[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=EOS,
        unk_token=UNKNOWN,
        additional_special_tokens=list(ROLES),
        chat_template=CHAT,
    )


def adapt(tokenizer: PreTrainedTokenizerFast, task: Task) -> None:
    """Add a task's tokens and template to a fine-tune's copy of the base's tokenizer."""
    tokenizer.add_tokens(list(task.added_tokens))
    tokenizer.chat_template = task.template


@dataclass(frozen=True)
class Frame:
    """The text that a chat template puts around a single user message. Rendered once, as rendering is slow."""

    before: str
    after: str

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerFast, instruction: str | None = None) -> Self:
        """The frame, with ``instruction`` as the system message."""
        system = [{"role": "system", "content": instruction}] if instruction else []
        chat = [*system, {"role": "user", "content": _MARK}]
        text = str(tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True))
        before, _, after = text.partition(_MARK)
        return cls(before, after)

    def prompt(self, question: str) -> str:
        """The prompt for a question."""
        return f"{self.before}{question}{self.after}"


def encode(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of each text, without special tokens."""
    tokens: list[list[int]] = tokenizer(list(texts), add_special_tokens=False)["input_ids"]
    return tokens
