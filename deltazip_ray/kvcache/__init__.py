"""Management of the KV cache's blocks."""
