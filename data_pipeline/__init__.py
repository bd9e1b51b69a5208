"""From raw text to batches: corpus, tokenizer, shards, index, order, loader, verify. See README.md."""
