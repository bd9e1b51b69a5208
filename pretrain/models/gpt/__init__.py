"""GPT decoders: GPT-1 to GPT-3, Llama and what lies between them."""
