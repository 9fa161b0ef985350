"""Tiny random models of transformers, and what must hold of one whose experts moe_gpu serves, on any device."""

from __future__ import annotations

import copy
import importlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from moe_gpu.huggingface import register
from moe_gpu.huggingface.attachment import Attachment
from moe_gpu.huggingface.layout import ATTACHMENT
from tests.kernel_cases import check_close

VOCABULARY = 96
_SIZES = dict(
    vocab_size=VOCABULARY,
    hidden_size=32,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    num_experts_per_tok=2,
    bos_token_id=1,
    eos_token_id=None,
    pad_token_id=0,
)
_DECODER = dict(_SIZES, num_hidden_layers=2, head_dim=8, intermediate_size=48)
_MIXTRAL = dict(_DECODER, intermediate_size=24, num_local_experts=6)
_QWEN = dict(_DECODER, moe_intermediate_size=24, num_experts=6)
_GLM = dict(
    _DECODER,
    moe_intermediate_size=24,
    n_routed_experts=8,
    n_group=2,
    topk_group=1,
    first_k_dense_replace=1,
    n_shared_experts=1,
)
_LATENT_ATTENTION = dict(
    num_key_value_heads=4, q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8
)
_LINEAR_ATTENTION = dict(
    layer_types=["linear_attention", "full_attention"],
    linear_num_value_heads=4,
    linear_num_key_heads=2,
    linear_key_head_dim=8,
    linear_value_head_dim=8,
    shared_expert_intermediate_size=24,
)
_NEMOTRON = dict(
    _SIZES,
    layers_block_type=["mamba", "moe", "attention", "moe"],
    head_dim=8,
    intermediate_size=48,
    moe_intermediate_size=24,
    moe_shared_expert_intermediate_size=24,
    n_routed_experts=6,
    n_group=1,
    topk_group=1,
    mamba_num_heads=4,
    mamba_head_dim=8,
    ssm_state_size=8,
    n_groups=2,
    chunk_size=8,
)

# Name -> configuration class, its sizes, and how many modules with experts the model then has.
MODELS: dict[str, tuple[str, dict[str, Any], int]] = {
    "qwen3_moe": ("Qwen3MoeConfig", _QWEN, 2),
    "mixtral": ("MixtralConfig", _MIXTRAL, 2),
    "olmoe": ("OlmoeConfig", {**_QWEN, "intermediate_size": 24}, 2),
    "gpt_oss": ("GptOssConfig", _MIXTRAL, 2),
    "deepseek_v3": ("DeepseekV3Config", {**_GLM, **_LATENT_ATTENTION}, 1),
    "glm4_moe": ("Glm4MoeConfig", _GLM, 1),
    "qwen3_next": ("Qwen3NextConfig", {**_QWEN, **_LINEAR_ATTENTION}, 2),
    "minimax_m2": ("MiniMaxM2Config", _MIXTRAL, 2),
    "granitemoe": ("GraniteMoeConfig", _MIXTRAL, 2),
    "nemotron_h": ("NemotronHConfig", _NEMOTRON, 2),
}
FUSED = set(MODELS) - {"gpt_oss", "nemotron_h"}


def make_config(name: str, **changes: Any) -> Any:
    import transformers

    kind, sizes, _ = MODELS[name]
    return getattr(transformers, kind)(**{**sizes, **changes})


def make_model(name: str, device: str = "cpu", std: float = 0.2, **changes: Any) -> nn.Module:
    """A random model for evaluation with transformers' own loop over experts, large enough weights to be seen."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(make_config(name, **changes), experts_implementation="eager")
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=std)
    return model.eval().to(device)


def experts_of(model: nn.Module) -> list[nn.Module]:
    return [module for name, module in model.named_modules() if name.endswith(".experts")]


def attachment_of(experts: nn.Module) -> Attachment:
    return vars(experts)[ATTACHMENT]


def state_of(model: nn.Module) -> object:
    """What a refusal and `disable` must leave as it was."""
    parameters = [(name, p.data_ptr(), p.device, p.requires_grad) for name, p in model.named_parameters()]
    modules = [(name, sorted(vars(m)), len(m._load_state_dict_pre_hooks)) for name, m in model.named_modules()]
    return parameters, modules, [(m.config, m.config._experts_implementation) for m in experts_of(model)]


def expert_bytes(model: nn.Module) -> int:
    return sum(parameter[0].nbytes for parameter in experts_of(model)[0].parameters())


def prompt(device: str = "cpu") -> torch.Tensor:
    return torch.randint(2, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(1)).to(device)


@dataclass(frozen=True)
class Outcome:
    """A model's logits, and the gradient of every parameter that has one."""

    logits: torch.Tensor
    gradients: dict[str, torch.Tensor]


def run(model: nn.Module) -> Outcome:
    """Forward and backward of the prompt."""
    model.zero_grad()
    logits = model(prompt(str(model.device))).logits
    grad = torch.randn(logits.shape, generator=torch.Generator().manual_seed(2))
    logits.backward(grad.to(logits))
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return Outcome(logits.detach(), gradients)


def check_outcome(got: Outcome, expected: Outcome, tolerance: float = 1e-5) -> None:
    """Logits within the tolerance, every gradient within it times its scale (at least 1)."""
    error = (got.logits - expected.logits).abs().max().item()
    assert error <= tolerance, f"logits are off by {error:.3g}"
    assert got.gradients.keys() == expected.gradients.keys()
    for name, gradient in expected.gradients.items():
        scale = max(gradient.abs().max().item(), 1.0)
        error = (got.gradients[name] - gradient).abs().max().item()
        assert error <= tolerance * scale, f"gradient of {name} is off by {error:.3g} of {scale:.3g}"


def zeros_forward(experts: nn.Module, hidden_states, top_k_index, top_k_weights) -> torch.Tensor:
    """An implementation that computes nothing: whatever does not notice it proves nothing."""
    return 0 * (hidden_states + sum(parameter.sum() for parameter in experts.parameters()) + top_k_weights.sum())


def serve(experts: nn.Module, *arguments: torch.Tensor) -> torch.Tensor:
    """The experts' output by moe_gpu, as transformers would call it."""
    register()
    interface = importlib.import_module("transformers.integrations.moe").ALL_EXPERTS_FUNCTIONS
    return interface["moe_gpu"](experts, *arguments)


def routes(experts: nn.Module, num_tokens: int = 40, device: str = "cpu") -> tuple[torch.Tensor, ...]:
    """Random hidden states, ids and weights of two experts a token, in float32."""
    width = experts.down_proj.shape[2 if experts.is_transposed else 1]
    generator = torch.Generator().manual_seed(3)
    scores = torch.rand(num_tokens, experts.num_experts, generator=generator)
    weights, ids = scores.topk(2, dim=1)
    hidden = torch.randn(num_tokens, width, generator=generator)
    return hidden.to(device), ids.to(device), (weights / weights.sum(1, keepdim=True)).to(device)


def check_error_rule(
    experts: nn.Module, dtype: torch.dtype, implementation: Any, device: str = "cpu", num_tokens: int = 40
) -> None:
    """Output and gradients of `implementation` in `dtype` against transformers' loop in float64 and in `dtype`."""
    results = {}
    experts.to(device, dtype)  # the truth is that of the rounded weights and inputs
    hidden, ids, weights = routes(experts, num_tokens, device)
    hidden, weights = hidden.to(dtype), weights.to(dtype)
    for kind in (torch.float64, dtype, "served"):
        to = dtype if kind == "served" else kind
        experts.to(to)
        leaves = [hidden.to(to, copy=True).requires_grad_(), weights.to(to, copy=True).requires_grad_()]
        leaves += experts.parameters()
        call = implementation if kind == "served" else type(experts).forward
        out = call(experts, leaves[0], ids, leaves[1])
        grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(4)).to(out)
        results[kind] = [out.detach().clone(), *(g.clone() for g in torch.autograd.grad(out, leaves, grad))]
        assert out.dtype == to
    names = ["output", "hidden", "routing weights", *(name for name, _ in experts.named_parameters())]
    for name, got, same, truth in zip(names, results["served"], results[dtype], results[torch.float64], strict=True):
        check_close(name, got, same, truth, dtype)


def quantise(weight: torch.Tensor, block: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """float8 values and the scale of each block, to be multiplied."""
    tiles = weight.view(weight.shape[0], weight.shape[1] // block[0], block[0], -1, block[1])
    scale = tiles.abs().amax((2, 4)) / torch.finfo(torch.float8_e4m3fn).max
    values = (tiles / scale[:, :, None, :, None]).view(weight.shape).to(torch.float8_e4m3fn)
    return values, scale


def make_fp8(
    scale_fmt: str = "float", block: tuple[int, int] | None = (16, 8), **changes: Any
) -> tuple[nn.Module, nn.Module]:
    """A model whose experts are transformers' FP8Experts, and its twin with the dequantised values in float32."""
    from transformers import FineGrainedFP8Config
    from transformers.integrations.finegrained_fp8 import replace_with_fp8_linear

    twin = make_model("qwen3_moe", **changes)
    model = copy.deepcopy(twin)
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    config = FineGrainedFP8Config(weight_block_size=block, scale_fmt=scale_fmt)
    replace_with_fp8_linear(model, modules_to_not_convert=names, quantization_config=config)
    for plain, experts in zip(experts_of(twin), experts_of(model), strict=True):
        assert type(experts).__name__ == "FP8Experts"
        for name in ("gate_up_proj", "down_proj"):
            weight = getattr(plain, name).data
            if block is None:  # a scale for the gate half and one for the up half
                whole = (weight.shape[1] // getattr(experts, f"{name}_scale_inv").shape[1], weight.shape[2])
            values, scale = quantise(weight, block or whole)
            if scale_fmt == "ue8m0":
                scale = scale.log2().ceil().exp2().to(torch.float8_e8m0fnu)
            setattr(experts, name, nn.Parameter(values, requires_grad=False))
            setattr(experts, f"{name}_scale_inv", nn.Parameter(scale, requires_grad=False))
            rows, columns = (weight.shape[i + 1] // scale.shape[i + 1] for i in range(2))
            full = scale.float().repeat_interleave(rows, 1).repeat_interleave(columns, 2)
            getattr(plain, name).data.copy_(values.float() * full)
    return model, twin


READ_AS_FP8 = dict(block=(32, 32), hidden_size=64, moe_intermediate_size=32, std=0.1)
"""What make_fp8 takes for widths that kernels read as FP8."""


def check_fp8_error_rule(model: nn.Module, twin: nn.Module, dtype: torch.dtype, num_tokens: int = 40) -> None:
    """The first experts of make_fp8's models in inference: against transformers' loop on the dequantised weights.

    The truth is that of the exact weights, in float64.
    """
    experts, plain = experts_of(model)[0], experts_of(twin)[0]
    hidden, ids, weights = routes(plain, num_tokens, str(model.device))
    hidden, weights = hidden.to(dtype), weights.to(dtype)
    with torch.no_grad():
        got = serve(experts, hidden, ids, weights)
        truth = type(plain).forward(copy.deepcopy(plain).double(), hidden.double(), ids, weights.double())
        same = type(plain).forward(copy.deepcopy(plain).to(dtype), hidden, ids, weights)
    assert got.dtype == dtype
    check_close("FP8 experts", got, same, truth, dtype)
