"""A small decoder whose feed-forward layers are all AdvancedMoELayer, and its routing traces."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from moe_gpu.model import AdvancedMoELayer
from moe_gpu.moe_layer import MoEStats
from moe_gpu.profiler import ExpertProfiler, RoutingTrace
from moe_gpu.training.config import DTYPES, TrainConfig


def rotate(x_BNSD: torch.Tensor, angle_SC: torch.Tensor) -> torch.Tensor:
    """Rotary positions (RoFormer, arXiv 2104.09864): each pair of the D = 2C channels turned by its angle."""
    first, second = x_BNSD.chunk(2, dim=-1)
    cos, sin = angle_SC.cos().to(x_BNSD.dtype), angle_SC.sin().to(x_BNSD.dtype)
    return torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1)


class Block(nn.Module):
    """Pre-norm causal attention with rotary positions, then a pre-norm MoE layer, each added to the residual stream."""

    def __init__(self, config: TrainConfig, layer_index: int, profiler: ExpertProfiler) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.attention_norm = nn.RMSNorm(config.model_dim)
        self.qkv = nn.Linear(config.model_dim, 3 * config.model_dim, bias=False)
        self.attention_out = nn.Linear(config.model_dim, config.model_dim, bias=False)
        self.moe_norm = nn.RMSNorm(config.model_dim)
        self.moe = AdvancedMoELayer.from_config(
            config.moe,
            use_triton=config.use_triton,
            use_cuda_graphs=False,
            enable_energy_monitoring=False,
            total_slices=1,
            profiler=profiler,
            layer_index=layer_index,
        )

    def forward(self, x_BSH: torch.Tensor, angle_SC: torch.Tensor) -> tuple[torch.Tensor, MoEStats]:
        qkv = self.qkv(self.attention_norm(x_BSH)).unflatten(-1, (3, self.num_heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # each (B, heads, S, head width)
        q, k = rotate(q, angle_SC), rotate(k, angle_SC)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x_BSH = x_BSH + self.attention_out(attended.transpose(1, 2).flatten(2))
        out_BSH, stats = self.moe(self.moe_norm(x_BSH))
        return x_BSH + out_BSH, stats


class MoELanguageModel(nn.Module):
    """Tokens to next-token logits; the output projection is the embedding (tied). `config.seed` decides the weights.

    One `profiler`, shared by all layers, counts the routes of every forward pass outside `unprofiled()`.
    """

    angle_SC: torch.Tensor

    def __init__(self, config: TrainConfig) -> None:
        super().__init__()
        self.config = config
        self.profiler = ExpertProfiler(config.num_experts, config.num_layers)
        with torch.random.fork_rng(devices=[]):  # made on the CPU: the same weights on every device
            torch.manual_seed(config.seed)
            self.embedding = nn.Embedding(config.vocab_size, config.model_dim)
            nn.init.normal_(self.embedding.weight, std=0.02)
            self.blocks = nn.ModuleList(Block(config, index, self.profiler) for index in range(config.num_layers))
            self.norm = nn.RMSNorm(config.model_dim)
        channels = config.model_dim // config.num_heads // 2
        inverse_C = 10_000.0 ** -(torch.arange(channels) / channels)
        self.register_buffer("angle_SC", torch.arange(config.context).outer(inverse_C), persistent=False)
        self.to(config.device)

    def forward(self, tokens_BS: torch.Tensor) -> tuple[torch.Tensor, list[MoEStats]]:
        """Logits (B, S, vocab_size) and each layer's statistics. ValueError for a sequence beyond the context."""
        length = tokens_BS.shape[1]
        if length > self.config.context:
            raise ValueError(f"sequence of {length} tokens exceeds context={self.config.context}; cut it")
        dtype = DTYPES[self.config.dtype]
        stats = []
        with torch.autocast(tokens_BS.device.type, dtype=dtype, enabled=dtype != torch.float32):
            x_BSH = self.embedding(tokens_BS)
            for block in self.blocks:
                x_BSH, block_stats = self._run(block, x_BSH, self.angle_SC[:length])
                stats.append(block_stats)
            logits_BSV = F.linear(self.norm(x_BSH), self.embedding.weight)
        return logits_BSV, stats

    def _run(self, block: nn.Module, x_BSH: torch.Tensor, angle_SC: torch.Tensor) -> tuple[torch.Tensor, MoEStats]:
        if not (self.config.gradient_checkpointing and torch.is_grad_enabled()):
            return block(x_BSH, angle_SC)
        return checkpoint(block, x_BSH, angle_SC, use_reentrant=False)  # the profiler passes over the second pass

    @property
    def moe_layers(self) -> list[AdvancedMoELayer]:
        return [block.moe for block in self.blocks]  # type: ignore[union-attr,misc]

    @property
    def backend(self) -> str:
        """Which backend serves the MoE layers: `triton` or `reference`."""
        return self.moe_layers[0].ops.backend.name

    @contextmanager
    def unprofiled(self) -> Iterator[None]:
        """Forward passes in here, such as an evaluation, are not counted."""
        for layer in self.moe_layers:
            layer.profiler = None
        try:
            yield
        finally:
            for layer in self.moe_layers:
                layer.profiler = self.profiler


@torch.no_grad()
def record_trace(
    model: MoELanguageModel, tokens: torch.Tensor, max_tokens: int, source: str = "held-out text"
) -> RoutingTrace:
    """Which experts each of the first `max_tokens` tokens of a text (1-D) chose in every layer, in text order.

    The text is cut into sequences of the model's context; the last one may be shorter. Raises ValueError for no tokens.
    """
    if tokens.dim() != 1 or tokens.numel() == 0 or max_tokens < 1:
        raise ValueError(
            f"tokens of shape {tuple(tokens.shape)} and max_tokens={max_tokens}: a trace needs a 1-D text and one token"
        )
    config = model.config
    text = tokens[:max_tokens].to(config.device).long()
    whole = text.numel() // config.context * config.context
    batches = list(text[:whole].view(-1, config.context).split(config.batch_size)) if whole else []
    if whole < text.numel():
        batches.append(text[whole:].unsqueeze(0))
    steps = []
    with model.unprofiled():
        for tokens_BS in batches:
            stats = model(tokens_BS)[1]
            steps.append([layer.routing.topk_ids_TK for layer in stats])
    return RoutingTrace.from_steps(steps, config.num_experts, source)
