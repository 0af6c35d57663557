"""Between text and tokens: each version's own tokenizer and chat template, and text that grows token by token."""
