"""The HTTP front: names, tokenizers, placement's caller, text."""
