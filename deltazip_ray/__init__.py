"""DeltaZip on Ray Serve: many full-parameter fine-tunes of one base LLM from the same GPUs."""
