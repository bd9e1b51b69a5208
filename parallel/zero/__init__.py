"""DeepSpeed: its settings, engines, optimizer state, and offload. The only folder that imports deepspeed."""
