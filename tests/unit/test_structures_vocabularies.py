"""Structures over the kinds of tokenizers there are: what a random walk through the masks decodes to matches."""

import json
import random
from collections.abc import Callable
from typing import Any

import jsonschema
import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from deltazip_deployments.text.detokenizer import Detokenizer
from deltazip_deployments.text.vocabulary import make_vocabulary
from deltazip_ray.engine.structure.grammars import GrammarMatcher, Vocabulary, compile_structure
from deltazip_ray.errors import InvalidRequest
from deltazip_ray.scheduler.request import Structure

TEXT = [
    '{"name": "the größte cat", "tags": [true, false, null, -12.5]}',
    "a cat sat on the mat, 日本",
    " the end\n",
] * 20
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "size": {"type": "integer", "minimum": 0, "maximum": 999},
        "kind": {"enum": ["größte", "日本", 'a "b" \\c']},
    },
    "required": ["name", "kind"],
    "additionalProperties": False,
}


def byte_level() -> Tokenizer:
    """As Llama 3's and Qwen's."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(TEXT, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet))
    return tokenizer


def byte_fallback() -> Tokenizer:
    """As Llama 2's and Mistral's."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    trained.train_from_iterator(TEXT, trainers.BpeTrainer(vocab_size=120))
    state = json.loads(trained.to_str())["model"]
    names = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *state["vocab"]]
    merges = [tuple(merge) for merge in state["merges"]]
    model = models.BPE({name: i for i, name in enumerate(names)}, merges, byte_fallback=True, unk_token="<unk>")
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


def finished(make: Callable[[], Tokenizer]) -> PreTrainedTokenizerFast:
    """With special tokens, and added ones that are text."""
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=make())
    tokenizer.add_special_tokens({"bos_token": "<s>", "eos_token": "</s>"})
    tokenizer.add_tokens([AddedToken('": "', normalized=False), AddedToken("<tool>", normalized=False)])
    return tokenizer


@pytest.mark.parametrize("make", [byte_level, byte_fallback])
def test_a_random_walk_decodes_to_what_the_schema_says(make: Callable[[], Tokenizer]) -> None:
    tokenizer = finished(make)
    end = tokenizer.eos_token_id
    vocabulary = Vocabulary.of(make_vocabulary(tokenizer, frozenset({end})))
    compiled = compile_structure(Structure("json_schema", json.dumps(SCHEMA)), vocabulary)
    prompt = tokenizer("a cat").input_ids
    chance = random.Random(1)
    for _ in range(40):
        matcher, tokens = GrammarMatcher(compiled), list[int]()
        while True:
            allowed = np.flatnonzero(np.unpackbits(matcher.allowed().view(np.uint8), bitorder="little"))
            assert tokenizer.bos_token_id not in allowed
            token = int(chance.choice(allowed))
            if token == end:
                break
            tokens.append(token)
            matcher.accept(token)
        text = Detokenizer(tokenizer.backend_tokenizer, prompt)
        said = "".join(text.feed([token]) for token in tokens) + text.finish()
        jsonschema.validate(json.loads(said), SCHEMA)


def test_a_model_without_an_end_has_no_structured_output() -> None:
    with pytest.raises(InvalidRequest, match="end token"):
        make_vocabulary(finished(byte_level), frozenset())
