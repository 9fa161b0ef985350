"""Enabling and disabling models of transformers: the report, refusals, counting, switching, wrappers, the scripts."""

from __future__ import annotations

import copy
import json
import pickle
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from moe_gpu import ExpertProfiler, disable, enable
from tests.test_imports import BLOCK
from tests.training_cases import one_thread  # noqa: F401

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("transformers.integrations.moe", reason="this transformers has no experts interface")

from tests.huggingface_cases import (  # noqa: E402
    VOCABULARY,
    check_outcome,
    experts_of,
    make_model,
    prompt,
    routes,
    run,
    serve,
    zeros_forward,
)

ROOT = Path(__file__).resolve().parent.parent


# The report, and what refuses


def test_the_report_names_every_module():
    model = make_model("deepseek_v3")
    report = enable(model)
    (row,) = report.modules
    assert row.module == "model.layers.1.mlp.experts"
    assert row.layout == "E=8 H=32 I=24 float32, gate and up, swiglu"
    assert (row.backend, row.why_not, row.layer_index) == ("reference", None, 0)
    assert "on cpu" in row.how
    features = {name: vars(feature) for name, feature in row.features.items()}
    module = {**vars(row), "features": features}
    assert json.loads(json.dumps(report.to_dict())) == {"covered": 1, "modules": [module]}
    lines = str(report).splitlines()
    assert lines[1].startswith("model.layers.1.mlp.experts  reference  E=8")
    assert lines[-1] == "1 of 1 modules with experts are served"


def test_layouts_of_gpt_oss_and_nemotron_h_are_described():
    gpt_oss, nemotron_h = (enable(make_model(name)).modules[0].layout for name in ("gpt_oss", "nemotron_h"))
    assert gpt_oss == "E=6 H=32 I=24 float32, gate and up interleaved, transposed, biases, own gate"
    assert nemotron_h == "E=6 H=32 I=24 float32, no gate, own activation"


def make_llama4() -> nn.Module:
    config = transformers.Llama4TextConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=24,
        intermediate_size_mlp=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_local_experts=4,
        pad_token_id=0,
    )
    return transformers.Llama4ForCausalLM(config)


def make_dense() -> nn.Module:
    sizes = dict(vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=1, head_dim=8)
    return transformers.Qwen3ForCausalLM(
        transformers.Qwen3Config(**sizes, num_attention_heads=4, num_key_value_heads=2, pad_token_id=0)
    )


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (make_llama4, r"none of 2 modules .* model.layers.0.feed_forward.experts: outside transformers' experts inter"),
        (make_dense, "no experts that go through"),
        (lambda: nn.Linear(2, 2), "no experts that go through"),
    ],
    ids=["llama4", "dense", "no model of transformers"],
)
def test_a_model_without_a_module_to_serve_is_refused(make, said):
    model = make()
    before = {name: set(vars(module)) for name, module in model.named_modules()}
    implementation = getattr(getattr(model, "config", None), "_experts_implementation", None)
    with pytest.raises(ValueError, match=said) as caught:
        enable(model)
    assert "\n" not in str(caught.value)
    assert "docs/huggingface.md" in str(caught.value)
    assert {name: set(vars(module)) for name, module in model.named_modules()} == before
    assert getattr(getattr(model, "config", None), "_experts_implementation", None) == implementation


def set_dtype(experts):
    experts.down_proj = nn.Parameter(experts.down_proj.data.to(torch.int8), requires_grad=False)


def set_scales(experts):
    experts.down_proj = nn.Parameter(experts.down_proj.data.to(torch.float8_e4m3fn), requires_grad=False)


def set_blocks(experts):
    set_scales(experts)
    experts.block_size = (128, 128)
    experts.down_proj_scale_inv = nn.Parameter(torch.ones(6, 2, 1))


class Subclass(torch.Tensor):
    pass


REFUSALS = {
    "int8": (set_dtype, "down_proj is int8; only float64, float32, bfloat16, float16, float8_e4m3fn are served"),
    "no scales": (set_scales, "down_proj is float8 and has no three-dimensional floating-point down_proj_scale_inv"),
    "part of a block": (set_blocks, "down_proj of 32 x 24 is not made of whole blocks for its 2 x 1 scales"),
    "no bias": (lambda e: setattr(e, "has_bias", True), "has_bias is set and there is no gate_up_proj_bias"),
    "no weight": (lambda e: delattr(e, "gate_up_proj"), "has no three-dimensional gate_up_proj"),
    "flat": (lambda e: setattr(e, "down_proj", nn.Parameter(torch.ones(6, 4))), "has no three-dimensional down_proj"),
    "other experts": (
        lambda e: setattr(e, "down_proj", nn.Parameter(torch.ones(5, 32, 24))),
        "gate_up_proj has 6 experts and down_proj has 5 experts",
    ),
    "subclass": (
        lambda e: (
            (e.register_parameter("down_proj", None), delattr(e, "down_proj"))
            and setattr(e, "down_proj", torch.ones(6, 32, 24).as_subclass(Subclass))
        ),
        "down_proj is a Subclass, not a plain tensor",
    ),
    "megamoe": (
        lambda e: (
            setattr(e, "config", copy.copy(e.config))
            or setattr(e.config, "_experts_implementation", "deepgemm_megamoe")
        ),
        "deepgemm_megamoe has rearranged its weights",
    ),
}


@pytest.mark.parametrize(("spoil", "reason"), REFUSALS.values(), ids=REFUSALS)
def test_a_module_that_cannot_be_served_is_refused_with_the_reason_and_left_alone(spoil, reason):
    model = make_model("mixtral")
    first, second = experts_of(model)
    spoil(second)
    config = second.config
    before = config._experts_implementation
    report = enable(model)
    assert [row.covered for row in report.modules] == [True, False]
    assert report.not_covered[0].why_not.startswith(reason)
    assert "not covered" in str(report)
    assert first.config._experts_implementation == "moe_gpu"
    assert second.config._experts_implementation == before
    disable(model)
    assert second.config is config
    assert (first.config._experts_implementation, config._experts_implementation) == ("eager", before)


def test_a_model_with_a_refused_module_still_computes_it_as_before():
    model = make_model("mixtral")
    expected = run(model)
    experts_of(model)[1].has_bias = True  # which the loop of transformers does not read
    assert len(enable(model).not_covered) == 1
    check_outcome(run(model), expected)


def test_by_name_a_module_that_cannot_be_served_raises_with_the_reason():
    experts = experts_of(make_model("mixtral"))[0]
    set_dtype(experts)
    with pytest.raises(ValueError, match="moe_gpu cannot serve these experts: down_proj is int8"):
        serve(experts, *routes(experts))
    with pytest.raises(ValueError, match=r"shape \(1, 40, 32\); expected \(tokens, width\)"):
        serve(experts, torch.zeros(1, 40, 32), *routes(experts)[1:])


# Enabling and disabling


def test_disable_restores_exactly_what_was_there():
    model = make_model("qwen3_moe")
    model.set_experts_implementation("grouped_mm")
    configs = [module.config for module in experts_of(model)]
    attributes = {name: sorted(vars(module)) for name, module in model.named_modules()}
    state = {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
    for _ in range(2):  # enabling twice is enabling once
        enable(model, ExpertProfiler(6, num_layers=2))
    assert model.config._experts_implementation == "moe_gpu"
    for _ in range(2):
        disable(model)
        assert model.config._experts_implementation == "grouped_mm"
        assert [module.config for module in experts_of(model)] == configs
        assert all(got is kept for got, kept in zip([m.config for m in experts_of(model)], configs, strict=True))
        assert {name: sorted(vars(module)) for name, module in model.named_modules()} == attributes
        assert {name: tensor.data_ptr() for name, tensor in model.state_dict().items()} == state


def test_transformers_switches_away_as_usual_and_disable_still_restores():
    model = make_model("qwen3_moe")
    profiler = ExpertProfiler(6, num_layers=2)
    enable(model, profiler)
    model.set_experts_implementation("grouped_mm")
    model(prompt())
    assert profiler.counts_LE() is None
    disable(model)
    assert model.config._experts_implementation == "eager"


def test_the_name_is_known_after_register_and_a_saved_model_has_no_trace(tmp_path):
    from moe_gpu.huggingface import register

    register()
    model = make_model("qwen3_moe")
    expected = run(model)
    enable(model)
    model.save_pretrained(tmp_path)
    assert "moe_gpu" not in (tmp_path / "config.json").read_text()
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, experts_implementation="moe_gpu")
    assert loaded.config._experts_implementation == "moe_gpu"
    check_outcome(run(loaded), expected)


def test_copies_of_an_enabled_model_are_served_and_count_nothing():
    model = make_model("qwen3_moe")
    profiler = ExpertProfiler(6, num_layers=2)
    enable(model, profiler)
    expected = model(prompt()).logits
    profiler.flush()
    counted = profiler.counts_LE().clone()
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(prompt()).logits, expected)
        disable(other)
        assert other.config._experts_implementation == "eager"
    assert model.config._experts_implementation == "moe_gpu"
    profiler.flush()
    assert torch.equal(profiler.counts_LE(), counted)


def test_importing_registers_nothing_and_imports_no_transformers():
    code = (
        "import sys, moe_gpu, moe_gpu.huggingface\n"
        "moe_gpu.enable, moe_gpu.disable, moe_gpu.CoverageReport\n"
        "assert 'transformers' not in sys.modules\n"
        "from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS\n"
        "from transformers.integrations.finegrained_fp8 import ALL_FP8_EXPERTS_FUNCTIONS as FP8\n"
        "tables = [ALL_EXPERTS_FUNCTIONS, FP8]\n"
        "assert not any('moe_gpu' in table for table in tables)\n"
        "moe_gpu.huggingface.register()\n"
        "assert all('moe_gpu' in table for table in tables)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def test_without_transformers_the_remedy_is_named():
    code = (
        BLOCK + "import torch, moe_gpu\ntry: moe_gpu.enable(torch.nn.Linear(2, 2))\nexcept ImportError as e: print(e)"
    )
    done = subprocess.run([sys.executable, "-c", code, "transformers"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "pip install 'moe-gpu[hf]'" in done.stdout


# Counting


def test_routes_are_counted_by_layer_and_expert():
    model = make_model("qwen3_moe")
    chosen = []
    for experts in experts_of(model):
        experts.register_forward_pre_hook(lambda module, inputs: chosen.append(inputs[1]))
    profiler = ExpertProfiler(6, num_layers=2)
    report = enable(model, profiler)
    assert [row.layer_index for row in report.modules] == [0, 1]
    model(prompt())
    profiler.flush()
    expected = [torch.bincount(ids.flatten(), minlength=6).tolist() for ids in chosen]
    assert profiler.counts_LE().tolist() == expected
    assert profiler.snapshot(1).counts_E == expected[1]


CHECKPOINTING = {"reentrant": (True, False), "not reentrant": (False, False), "compiled": (False, True)}


@pytest.mark.parametrize(("reentrant", "compiled"), CHECKPOINTING.values(), ids=CHECKPOINTING)
def test_gradient_checkpointing_counts_once_and_changes_no_gradient(reentrant, compiled):
    model = make_model("qwen3_moe", use_cache=False)
    expected = run(model)
    profiler = ExpertProfiler(6, num_layers=2)
    enable(model, profiler)
    calls = []
    for experts in experts_of(model):
        experts.register_forward_pre_hook(lambda module, inputs: calls.append(1))
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.enable_input_require_grads()
    model.train()
    if compiled:
        torch._dynamo.reset()
        profiler.attach("cpu")
        model.forward = torch.compile(model.forward, backend="aot_eager")
    check_outcome(run(model), expected)
    assert compiled or len(calls) == 4  # each layer twice
    profiler.flush()
    assert profiler.counts_LE().sum(1).tolist() == [2 * 9 * 2] * 2


@pytest.mark.parametrize(
    ("profiler", "said"),
    [
        (ExpertProfiler(6), r"num_layers=1 and the model has 2 .* ExpertProfiler\(num_experts, num_layers=2\)"),
        (ExpertProfiler(5, num_layers=2), r"num_experts=5 and the model has 6; make ExpertProfiler\(6, num_layers=2\)"),
    ],
)
def test_a_profiler_that_does_not_fit_is_refused_and_nothing_changes(profiler, said):
    model = make_model("qwen3_moe")
    with pytest.raises(ValueError, match=said):
        enable(model, profiler)
    assert model.config._experts_implementation == "eager"


class Wrapper(nn.Module):
    """What PEFT puts in an experts module's place."""

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer

    def forward(self, *arguments):
        return self.base_layer(*arguments)


def test_a_wrapped_module_is_found_inside_its_wrapper():
    model = make_model("qwen3_moe")
    expected = run(model)
    for layer in model.model.layers:
        layer.mlp.experts = Wrapper(layer.mlp.experts)
    report = enable(model)
    assert [row.module for row in report.modules] == [f"model.layers.{i}.mlp.experts.base_layer" for i in range(2)]
    torch.testing.assert_close(run(model).logits, expected.logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
@pytest.mark.parametrize("num_tokens", [0, 1])
def test_no_token_and_one_token(name, num_tokens):
    experts = experts_of(make_model(name))[0]
    hidden, ids, weights = routes(experts, num_tokens)
    got = serve(experts, hidden.requires_grad_(), ids, weights)
    assert got.shape == (num_tokens, 32)
    torch.testing.assert_close(got, type(experts).forward(experts, hidden, ids, weights), atol=1e-5, rtol=1e-5)
    got.sum().backward()
    assert torch.isfinite(experts.down_proj.grad).all()


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_inputs_need_not_be_contiguous_and_are_not_written(name):
    experts = experts_of(make_model(name))[0]
    hidden, ids, weights = routes(experts)
    wide = torch.cat([hidden, hidden], 1)[:, :32]
    strided = (wide, ids.repeat(1, 2)[:, :2], weights.t().contiguous().t())
    kept = [tensor.clone() for tensor in strided]
    torch.testing.assert_close(serve(experts, *strided), serve(experts, hidden, ids, weights))
    assert all(torch.equal(now, before) for now, before in zip(strided, kept, strict=True))


def test_parts_of_a_model_can_be_enabled():
    """A wrapper around a model, and one layer of it: the choice is its configuration's, as in transformers."""
    model = make_model("qwen3_moe")
    expected = run(model)
    report = enable(nn.ModuleDict({"inner": model}))
    assert report.modules[0].module == "inner.model.layers.0.mlp.experts"
    check_outcome(run(model), expected)
    disable(model)
    enable(model.model.layers[1])
    assert model.config._experts_implementation == "moe_gpu"
    disable(model)
    assert model.config._experts_implementation == "eager"


def test_two_processes_of_transformers_parallelism_and_fsdp_agree_with_one():
    """Tensor and expert parallelism as transformers 5.17 applies them, and FSDP, which renames the class."""
    pytest.importorskip("transformers.distributed.tensor_parallel", reason="this transformers shards models otherwise")
    command = [sys.executable, "-m", "tests.huggingface_parallel"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count(": right") == 4


def test_the_benchmark_script_decodes_with_the_flags_too(tmp_path, monkeypatch):
    from moe_gpu.results import BenchmarkRow, read_rows, select

    script = runpy.run_path(str(ROOT / "benchmarks" / "run_huggingface.py"))
    output = tmp_path / "rows.jsonl"
    monkeypatch.setattr(sys, "argv", ["run_huggingface.py", "--quick", "--section", "decode", str(output)])
    assert script["main"]() == 0
    rows = {row.provider: row for row in select(read_rows(output), BenchmarkRow)}
    assert all(row.status == "ok" and row.p50_ms > 0 for row in rows.values())
    assert rows["moe_gpu_half_resident"].backend.endswith("active: expert_cache")
    assert rows["moe_gpu_graphs"].backend.endswith("active: nothing")  # there is no GPU


def test_the_benchmark_script_checks_what_it_times_and_runs_anywhere_when_quick(tmp_path, monkeypatch, capsys):
    from moe_gpu.results import BenchmarkRow, read_rows, select

    script = runpy.run_path(str(ROOT / "benchmarks" / "run_huggingface.py"))
    output = tmp_path / "rows.jsonl"
    monkeypatch.setattr(sys, "argv", ["run_huggingface.py", "--quick", "--section", "training", str(output)])
    assert script["main"]() == 0
    rows = select(read_rows(output), BenchmarkRow)
    assert [(row.provider, row.status) for row in rows] == [
        (name, "ok") for name in ("moe_gpu", "transformers_grouped_mm", "transformers_batched_mm", "transformers_eager")
    ]
    assert all(row.max_error <= row.allowed_error and row.p50_ms > 0 for row in rows)
    mapping = transformers.integrations.moe.ExpertsInterface._global_mapping
    monkeypatch.setitem(mapping, "grouped_mm", zeros_forward)  # a wrong one is not timed, and the others go on
    assert script["main"]() == 0
    wrong = {row.provider: row for row in select(read_rows(output), BenchmarkRow)}["transformers_grouped_mm"]
    assert (wrong.status, wrong.p50_ms) == ("wrong", None)
    assert "off by" in wrong.reason
    assert "wrong" in capsys.readouterr().out


def test_the_examples_of_the_page_run_one_after_another(capsys):
    page, names = (ROOT / "docs" / "huggingface.md").read_text(), {}
    for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
        exec(compile(block, "docs/huggingface.md", "exec"), names)
    output = capsys.readouterr().out
    for said in (
        "2 of 2 modules with experts are served",
        "'eager_calls': {'CUDA graphs need an NVIDIA GPU",
        "energy is read from the NVIDIA driver, and the layer is on cpu",
        "a slice of 32 SMs is held",
        "4 of 8 experts have slots of",
        "Counts(steps=",
    ):
        assert said in output, said
    assert names["model"].config._experts_implementation == "grouped_mm"
    assert all(parameter.requires_grad for parameter in names["model"].parameters())
