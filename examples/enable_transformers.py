"""Serve the experts of a `transformers` model by moe_gpu: `python examples/enable_transformers.py`.

A tiny Qwen3-MoE with random weights (nothing is downloaded): what is covered, that the logits are transformers' own,
which experts the tokens chose, and back again.
"""

from __future__ import annotations

import torch
from command_line import OneLineParser, run

import moe_gpu


def make_model(device: str) -> torch.nn.Module:
    try:
        import transformers
    except ImportError:
        raise ImportError("this example needs transformers; pip install 'moe-gpu[hf]'") from None
    torch.manual_seed(0)
    config = transformers.Qwen3MoeConfig(
        vocab_size=256,
        hidden_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        intermediate_size=128,
        moe_intermediate_size=32,
        num_experts=8,
        num_experts_per_tok=2,
        eos_token_id=None,
        pad_token_id=0,
    )
    return transformers.AutoModelForCausalLM.from_config(config).to(device).eval()


def main() -> None:
    parser = OneLineParser(description="Serve the experts of a transformers model by moe_gpu.")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: the GPU if there is one")
    device = parser.parse_args().device or ("cuda" if torch.cuda.is_available() else "cpu")
    model = make_model(device)
    ids = torch.arange(1, 33, device=device).view(2, 16)
    with torch.no_grad():
        before = model(ids).logits

    profiler = moe_gpu.ExpertProfiler(num_experts=8, num_layers=3)
    report = moe_gpu.enable(model, profiler)
    print(report)

    with torch.no_grad():
        difference = (model(ids).logits - before).abs().max().item()
    print(f"largest difference of the logits: {difference:.1e}")
    tokens = model.generate(ids, max_new_tokens=8, do_sample=False)
    print(f"generated: {tokens[0, -8:].tolist()}")
    profiler.flush()
    for layer, counts in enumerate(profiler.counts_LE().tolist()):
        print(f"layer {layer}: routes per expert {counts}")

    moe_gpu.disable(model)
    print(f"experts implementation afterwards: {model.config._experts_implementation}")


if __name__ == "__main__":
    run(main)
