"""The HTTP front: names, tokenizers, calls to replicas, text."""
