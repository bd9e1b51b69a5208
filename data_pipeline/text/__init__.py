"""From raw text to token ids: corpus and tokenizers."""
