"""Which requests run when: continuous batching across versions."""
