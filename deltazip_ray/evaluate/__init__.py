"""Task scores with EleutherAI's lm-eval harness, an optional dependency."""
