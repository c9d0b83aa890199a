"""From raw rows to batches: sources, prompts, tokenize, collate."""
