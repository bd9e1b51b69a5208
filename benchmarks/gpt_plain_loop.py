"""The same GPT as a plain single-process PyTorch loop: the upper bound that `gpt_vs_plain.py` measures against.

    python benchmarks/gpt_plain_loop.py CONFIG METRICS_FILE STEPS [section.key=value ...]

No DeepSpeed, no megatron-core, no hooks: embedding, blocks with `scaled_dot_product_attention`, tied head, AdamW,
clipping. It reads the same batches and starts from the same weights, so its losses must be those of `trainyard train`.
Pre-norm, LayerNorm, GELU, tied head only; other options of the config are refused.
"""

from __future__ import annotations

import json
import sys
import time

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data_pipeline.batch_plan import BatchPlan
from data_pipeline.loader import Loader, ReadOptions
from data_pipeline.tokens.token_dataset import TokenDataset
from parallel.parameter_plan import ParameterPlan, draw
from pretrain.config.run_config import load_config
from pretrain.training.optim import learning_rate


class Block(nn.Module):
    def __init__(self, hidden: int, heads: int, ffn: int, rotary_base: float | None):
        super().__init__()
        self.heads, self.rotary_base = heads, rotary_base
        self.norm_1, self.norm_2 = nn.LayerNorm(hidden), nn.LayerNorm(hidden)
        self.qkv, self.out = nn.Linear(hidden, 3 * hidden), nn.Linear(hidden, hidden)
        self.up, self.down = nn.Linear(hidden, ffn), nn.Linear(ffn, hidden)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:  # [b, s, h]
        b, s, h = x.shape
        qkv = self.qkv(self.norm_1(x)).view(b, s, self.heads, 3, h // self.heads).permute(3, 0, 2, 1, 4)
        q, k, v = qkv[0], qkv[1], qkv[2]  # [b, heads, s, d]
        if self.rotary_base:
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).reshape(b, s, h))
        return x + self.down(F.gelu(self.up(self.norm_2(x))))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    low, high = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-high, low), dim=-1) * sin


class PlainGPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.embedding = nn.Embedding(config.vocab_size, config.hidden)
        self.positions = None
        if config.positions == "learned":
            self.positions = nn.Parameter(torch.zeros(config.sequence_length, config.hidden))
        base = config.rotary_base if config.positions == "rotary" else None
        self.blocks = nn.ModuleList(
            Block(config.hidden, config.heads, config.ffn_hidden, base) for _ in range(config.layers)
        )
        self.final_norm = nn.LayerNorm(config.hidden)
        width = config.hidden // config.heads
        frequency = config.rotary_base ** (-torch.arange(0, width, 2) / width)
        angle = torch.outer(torch.arange(config.sequence_length).float(), frequency)
        angle = torch.cat((angle, angle), -1)
        self.cos, self.sin = angle.cos(), angle.sin()

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens[:, :-1])
        if self.positions is not None:
            x = x + self.positions
        for block in self.blocks:
            x = block(x, self.cos, self.sin)
        logits = F.linear(self.final_norm(x), self.embedding.weight)
        return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


OUR_NAMES = {
    "norm_1": "attention_norm", "norm_2": "feed_forward_norm", "qkv": "attention.qkv", "out": "attention.out",
    "up": "feed_forward.up", "down": "feed_forward.down",
}


def start_from_same_weights(model: PlainGPT, config, seed: int) -> None:
    """Fill the plain model with the initial weights that Trainyard draws for the parameters of the same role."""
    residual = config.init_std / (2 * config.layers) ** 0.5
    for name, parameter in model.named_parameters():
        parts = name.split(".")
        if parts[0] == "blocks":
            ours = f"blocks.{parts[1]}.{OUR_NAMES[parts[2]]}.{parts[3]}"
        else:
            ours = {"embedding": "embedding.table.weight", "positions": "positions.weight"}.get(parts[0], name)
        norm = "norm" in name
        std = residual if parts[2:3] in (["out"], ["down"]) else config.init_std
        if norm or name.endswith("bias"):
            std = 0.0
        mean = 1.0 if norm and name.endswith("weight") else 0.0
        parameter.data.copy_(draw(ours, tuple(parameter.shape), ParameterPlan(mean, std, None), seed))


def main() -> None:
    config = load_config(sys.argv[1], sys.argv[4:])
    model_config, total = config.model, int(sys.argv[3])
    if (model_config.norm, model_config.norm_position, model_config.activation) != ("layernorm", "pre", "gelu"):
        sys.exit("the plain loop knows LayerNorm before each part and GELU only")
    model = PlainGPT(model_config)
    start_from_same_weights(model, model_config, config.run.seed)
    o = config.optimizer
    decayed = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": decayed, "weight_decay": o.weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=o.lr, betas=(o.beta1, o.beta2), eps=o.epsilon, fused=True)
    plan = BatchPlan(seed=config.run.seed, global_batch=config.parallel.global_batch,
                     micro_batch=config.parallel.micro_batch)
    loader = Loader(TokenDataset.open(config.data.train), plan, ReadOptions(model_config.sequence_length))
    tokens = config.parallel.global_batch * model_config.sequence_length
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=config.precision.compute == "bf16")
    with open(sys.argv[2], "w", encoding="utf-8") as file:
        for step in range(1, total + 1):
            started = time.perf_counter()
            batches, loss = next(loader), 0.0
            for batch in batches:
                with autocast:
                    micro = model(batch["tokens"]) / len(batches)
                micro.backward()
                loss += float(micro.detach())
            nn.utils.clip_grad_norm_(model.parameters(), o.clip_norm)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(config.schedule, o, step, config.run.steps)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            seconds = time.perf_counter() - started
            file.write(json.dumps({"step": step, "loss": loss, "tokens_per_second": tokens / seconds}) + "\n")


if __name__ == "__main__":
    main()
