"""Task scores by EleutherAI's lm-eval harness, an optional dependency."""
