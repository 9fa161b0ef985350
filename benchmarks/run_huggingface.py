"""Time decoder layers of Qwen3-30B-A3B in `transformers`, experts by moe_gpu and by transformers' own implementations.

`python benchmarks/run_huggingface.py FILE.jsonl`: four layers with random weights, bf16, built from a configuration
(nothing is downloaded), on one NVIDIA H200: a forward pass, a training step (forward and backward, no optimiser) and a
decoding step on a static cache, eager and compiled (`reduce-overhead`, one graph), with `moe_gpu`, `grouped_mm`,
`batched_mm` and `eager` in turn. The eager decoding step also runs on two copies of the model, enabled with
`use_cuda_graphs` and with `hbm_budget="50%"`; its tokens change with every step, and random routing is the worst that
an expert cache can meet. The embedding and four decoder layers run, not the output head, which would outweigh four
layers. `--quick` runs a tiny model anywhere, to try the script.

Before timing, every implementation passes two checks. On the inputs of the first experts module (64 tokens of them):
output and gradients against float64, no further off than twice transformers' loop in bf16 plus one rounding. On the
whole output, of at least 64 tokens: the median over tokens of the relative distance (L2) from float32, at most twice
that of transformers' loop in bf16, and a model whose experts compute nothing must exceed that twofold. (The median,
because rounding changes the experts of some tokens of a random router, whichever implementation runs.)
"""

from __future__ import annotations

import argparse
import copy
import functools
import importlib
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from moe_gpu import nvml
from moe_gpu.benchmark import timing
from moe_gpu.benchmark.check import Comparison, WrongOutputError
from moe_gpu.benchmark.measure import Case
from moe_gpu.benchmark.timing import Job, Timer, attempt
from moe_gpu.config import PRESETS, MoEConfig
from moe_gpu.cuda_graph_manager import CUDAGraphManager
from moe_gpu.huggingface import enable, register
from moe_gpu.machine import describe_machine
from moe_gpu.results import BenchmarkRow, Row, select, write_rows

MODEL = "qwen3-30b-a3b"
OURS, LOOP, NOTHING = "moe_gpu", "eager", "moe_gpu_benchmark_zeros"
IMPLEMENTATIONS = (OURS, "grouped_mm", "batched_mm", LOOP)
# Arms of an enabled model, and the flags of `enable` that each has.
FLAGGED: dict[str, Callable[[], dict[str, Any]]] = {
    "moe_gpu_graphs": lambda: dict(use_cuda_graphs=CUDAGraphManager(min_calls=2, max_graphs=64)),
    "moe_gpu_half_resident": lambda: dict(hbm_budget="50%"),
}
CHECKED_TOKENS = 64
DTYPE = torch.bfloat16
PROMPT = 128  # tokens in the cache before the decoding step


@dataclass(frozen=True)
class Scale:
    """What is run: sizes of the model, and of each section."""

    moe: MoEConfig
    layers: int
    other: dict[str, int]
    training: tuple[int, ...]
    forward: tuple[int, ...]
    decode: tuple[int, ...]
    budget_s: float  # of samples per row


FULL = Scale(
    PRESETS[MODEL],
    4,
    dict(vocab_size=151936, num_attention_heads=32, num_key_value_heads=4, head_dim=128, intermediate_size=6144),
    training=(4096,),
    forward=(512, 4096, 16384),
    decode=(1, 64, 8),
    budget_s=1.0,
)
QUICK = Scale(
    MoEConfig(64, 64, 32, 8, 2),
    2,
    dict(vocab_size=256, num_attention_heads=4, num_key_value_heads=2, head_dim=16, intermediate_size=64),
    training=(256,),
    forward=(256,),
    decode=(2,),
    budget_s=0.05,
)


def zeros_forward(experts: nn.Module, hidden_states, top_k_index, top_k_weights) -> torch.Tensor:
    return 0 * (hidden_states + top_k_weights.sum() + sum(parameter.sum() for parameter in experts.parameters()))


def distance(value: torch.Tensor, truth: torch.Tensor) -> float:
    """Median over rows (the last axis) of the relative L2 distance, without rows that are to be zero."""
    size = truth.norm(dim=-1)
    return ((value.float() - truth).norm(dim=-1)[size > 0] / size[size > 0]).median().item()


class Model:
    """The layers under test, and their twin in float32."""

    def __init__(self, scale: Scale, device: torch.device) -> None:
        import transformers

        self.scale, self.device = scale, device
        c = scale.moe
        config = transformers.Qwen3MoeConfig(
            **scale.other,
            hidden_size=c.input_dim,
            moe_intermediate_size=c.hidden_dim,
            num_experts=c.num_experts,
            num_experts_per_tok=c.top_k,
            norm_topk_prob=c.router.norm_topk_prob,
            num_hidden_layers=scale.layers,
            max_position_embeddings=32768,
        )
        torch.manual_seed(0)
        with device:
            self.layers = transformers.AutoModel.from_config(config, dtype=DTYPE, experts_implementation=LOOP).eval()
        self.experts = [module for name, module in self.layers.named_modules() if name.endswith(".experts")]

    def choose(self, implementation: str) -> None:
        self.layers.set_experts_implementation(OURS if implementation in FLAGGED else implementation)

    def flagged(self, arm: str) -> tuple[nn.Module, str]:
        """A copy of the layers, enabled with the arm's flags, and in words what they came to."""
        layers = copy.deepcopy(self.layers)
        report = enable(layers, **FLAGGED[arm]())
        active = [name for name, feature in report.covered[0].features.items() if feature.active]
        return layers, f"active: {', '.join(active) or 'nothing'}"

    def ids(self, *shape: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(1)
        return torch.randint(0, self.layers.config.vocab_size, shape, generator=generator).to(self.device)

    def run(self, ids: torch.Tensor) -> torch.Tensor:
        return self.layers(input_ids=ids, use_cache=False).last_hidden_state

    @functools.cached_property
    def watched(self) -> tuple[nn.Parameter, ...]:
        """Parameters whose gradients are compared: those of the first experts, and of the router behind them."""
        first = self.experts[0]
        return first.gate_up_proj, first.down_proj, self.layers.layers[0].mlp.gate.weight

    @contextmanager
    def in_float32(self) -> Iterator[None]:
        """The same layers, computing in float32 meanwhile."""
        kept = {name: tensor.data for name, tensor in self.layers.named_parameters()}
        for parameter in self.layers.parameters():
            parameter.data = parameter.data.float()
        try:
            yield
        finally:
            for name, parameter in self.layers.named_parameters():
                parameter.data = kept[name]
                parameter.grad = None


class ExpertsCheck:
    """The first experts module on what really reaches it, against float64: the rule of every other benchmark here."""

    def __init__(self, model: Model, ids: torch.Tensor) -> None:
        caught: list[tuple[torch.Tensor, ...]] = []
        hook = model.experts[0].register_forward_pre_hook(lambda module, inputs: caught.append(inputs))
        model.choose(LOOP)
        with torch.no_grad():
            model.run(ids)
        hook.remove()
        hidden, chosen, weights = (tensor.detach()[:CHECKED_TOKENS] for tensor in caught[0])
        self.model, self.inputs = model, (hidden, chosen, weights)
        generator = torch.Generator().manual_seed(2)
        self.grad = torch.randn(hidden.shape, generator=generator).to(self.model.device)
        wide = copy.deepcopy(model.experts[0]).double()
        self.truth = self._compute(wide, torch.float64)
        self.loop = self._compute(model.experts[0], DTYPE)

    def _compute(self, experts: nn.Module, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        hidden, chosen, weights = self.inputs
        leaves = {"hidden": hidden.to(dtype).requires_grad_(), "weights": weights.to(dtype).requires_grad_()}
        leaves.update(experts.named_parameters())
        out = experts(leaves["hidden"], chosen, leaves["weights"])
        gradients = torch.autograd.grad(out, list(leaves.values()), self.grad.to(dtype))
        return {"output": out.detach(), **{f"gradient of {k}": g for k, g in zip(leaves, gradients, strict=True)}}

    def __call__(self, implementation: str) -> Comparison:
        """The output's comparison; WrongOutputError where it or a gradient is off."""
        self.model.choose(implementation)
        got = self._compute(self.model.experts[0], DTYPE)
        return {name: self._compare(name, got[name]) for name in self.truth}["output"]

    def without_gradients(self, experts: nn.Module) -> Comparison:
        """The same for the output alone, of other experts of the same weights."""
        with torch.no_grad():
            return self._compare("output", experts(*self.inputs))

    def _compare(self, name: str, got: torch.Tensor) -> Comparison:
        truth = self.truth[name]
        scale = truth.abs().max().item()
        allowed = 2 * (self.loop[name].double() - truth).abs().max().item() + torch.finfo(DTYPE).eps * scale
        found = Comparison((got.double() - truth).abs().max().item(), allowed, scale)
        if not (found.right and found.sensitive):
            raise WrongOutputError(f"{name} is off by {found.max_error:.3g}, allowed {allowed:.3g} of {scale:.3g}")
        return found


class OutputCheck:
    """The whole output, and gradients where wanted, against the same layers in float32."""

    def __init__(self, model: Model, compute: Callable[[], list[torch.Tensor]]) -> None:
        self.model, self.compute = model, compute
        model.choose(LOOP)
        with model.in_float32():
            self.truth = [value.detach().clone() for value in compute()]
        self.allowed = [2 * found for found in self.distances(LOOP)]
        nothing = self.distances(NOTHING)
        if not all(found > 2 * allowed for found, allowed in zip(nothing, self.allowed, strict=True)):
            raise WrongOutputError(f"the check cannot tell experts that compute nothing: {nothing} of {self.allowed}")

    def distances(self, implementation: str) -> list[float]:
        self.model.choose(implementation)
        return [distance(value.detach(), truth) for value, truth in zip(self.compute(), self.truth, strict=True)]

    def __call__(self, implementation: str, compute: Callable[[], list[torch.Tensor]] | None = None) -> str:
        """The output's distance in words; WrongOutputError where a distance exceeds what is allowed."""
        self.model.choose(implementation)
        values = (compute or self.compute)()
        found = [distance(value.detach(), truth) for value, truth in zip(values, self.truth, strict=True)]
        if not all(got <= allowed for got, allowed in zip(found, self.allowed, strict=True)):
            raise WrongOutputError(f"relative distances {found} exceed {self.allowed}")
        return f"median relative distance {found[0]:.2e}, allowed {self.allowed[0]:.2e}"


class Recorder:
    """Times the implementations of one case in turn, and keeps their rows."""

    def __init__(self, path: Path, model: Model, limit_s: float) -> None:
        self.path, self.model, self.limit_s = path, model, limit_s
        self.timer = Timer(model.device)
        self.rows: list[Row] = [describe_machine(model.device)]
        self.begin = time.monotonic()

    def record(
        self,
        num_tokens: int,
        mode: str,
        launch: str,
        build: Callable[[str], tuple[Job, dict[str, Any]]],
        unavailable: Mapping[str, str] = MappingProxyType({}),
        arms: Sequence[str] = IMPLEMENTATIONS,
    ) -> None:
        """A row per implementation: `build` checks it and gives its job and what is known of it."""
        budget_s, scale = self.model.scale.budget_s, self.model.scale
        case = Case(MODEL if scale is FULL else "tiny", scale.moe, num_tokens, DTYPE, "random weights", mode, launch)
        known: dict[str, dict[str, Any]] = {}
        jobs: dict[str, Job] = {}
        counts: dict[str, int] = {}
        for name in arms:
            if name in unavailable:
                known[name] = dict(status="unavailable", reason=unavailable[name])
                continue
            spent = time.monotonic() - self.begin
            if spent > self.limit_s:
                known[name] = dict(status="unavailable", reason=f"not run: {spent:.0f} s of {self.limit_s:.0f} s spent")
                continue
            outcome = attempt(functools.partial(self._prepare, build, name))
            if outcome.reason is None:
                jobs[name], known[name], estimate_ms = outcome.value
                counts[name] = timing.sample_count(estimate_ms, 40, budget_s)
            else:
                wrong = outcome.reason.startswith(WrongOutputError.__name__)
                known[name] = dict(status="wrong" if wrong else "failed", reason=outcome.reason)
        samples, failures = timing.time_interleaved(jobs, self.timer, counts)
        clock = None
        if self.model.device.type == "cuda":
            clock = nvml.sm_clock_mhz(f"GPU-{torch.cuda.get_device_properties(self.model.device).uuid}")
        for name in arms:
            facts = {"status": "ok", **known[name]}
            if name in failures:
                facts = dict(status="failed", reason=failures[name])
            if name in samples:
                facts.update(timing.describe_samples(samples[name]), sm_clock_mhz=clock)
                facts["tokens_per_s"] = num_tokens / facts["p50_ms"] * 1e3
            provider = name if name == OURS or name in FLAGGED else f"transformers_{name}"
            row = case.row(provider, facts.pop("status"), scope=f"{scale.layers} decoder layers", **facts)
            self.rows.append(row)
            shown = row.reason if row.p50_ms is None else f"{row.p50_ms:9.3f} ms"
            print(f"{time.monotonic() - self.begin:6.1f} s  {case!s:60} {name:22} {shown}", flush=True)
        write_rows(self.path, self.rows)

    def _prepare(self, build: Callable[[str], tuple[Job, dict[str, Any]]], name: str) -> tuple[Job, dict, float]:
        job, facts = build(name)
        estimate_ms = timing.warm_up(job, self.timer, self.model.scale.budget_s)
        facts["peak_memory_bytes"] = timing.peak_memory_bytes(job, self.model.device)
        return job, facts, estimate_ms

    def job(self, name: str, run: Callable[[], Any], reset: Callable[[], Any] = lambda: None) -> Job:
        """`run` with the implementation chosen, and `reset` called, before the clock starts."""

        def prepare() -> None:
            self.model.choose(name)
            reset()

        return Job(lambda _: run(), prepare)


def facts_of(experts: Comparison, words: str) -> dict[str, Any]:
    return dict(max_error=experts.max_error, allowed_error=experts.allowed_error, backend=words)


def training(recorder: Recorder) -> None:
    model = recorder.model
    for num_tokens in model.scale.training:
        ids = model.ids(1, num_tokens)
        grad = torch.randn(1, num_tokens, model.scale.moe.input_dim, generator=torch.Generator().manual_seed(3))
        grad = grad.to(model.device)

        def clear() -> None:
            model.layers.zero_grad(set_to_none=True)

        def step(ids: torch.Tensor = ids, grad: torch.Tensor = grad) -> torch.Tensor:
            out = model.run(ids)
            out.backward(grad.to(out.dtype))
            return out

        def compute(step: Callable[[], torch.Tensor] = step) -> list[torch.Tensor]:
            clear()
            return [step(), *(parameter.grad for parameter in model.watched)]

        check_experts = ExpertsCheck(model, ids)
        check_output = OutputCheck(model, compute)

        def build(name: str, step=step, experts=check_experts, output=check_output) -> tuple[Job, dict[str, Any]]:
            return recorder.job(name, step, clear), facts_of(experts(name), output(name))

        recorder.record(num_tokens, "forward+backward", "eager", build)
        clear()


def forward(recorder: Recorder) -> None:
    model = recorder.model
    for num_tokens in model.scale.forward:
        ids = model.ids(max(1, num_tokens // 4096), min(num_tokens, 4096))
        run = torch.no_grad()(functools.partial(model.run, ids))
        check_experts = ExpertsCheck(model, ids)
        check_output = OutputCheck(model, lambda run=run: [run()])

        def build(name: str, run=run, experts=check_experts, output=check_output) -> tuple[Job, dict[str, Any]]:
            return recorder.job(name, run), facts_of(experts(name), output(name))

        recorder.record(num_tokens, "forward", "eager", build)


class DecodeStep:
    """One token of each of `batch` sequences on a static cache, others in turn, at the same position."""

    def __init__(self, model: Model, batch: int) -> None:
        self.model, self.prompt = model, model.ids(batch, PROMPT)
        self.draws = model.ids(max(1, CHECKED_TOKENS // batch), batch, 1)
        self.token, self.turn = self.draws[0].clone(), 0
        self.positions = torch.full((batch, 1), PROMPT, device=model.device)

    def fill(self) -> Any:
        """A cache that holds the prompt."""
        import transformers

        cache = transformers.StaticCache(config=self.model.layers.config, max_cache_len=2 * PROMPT)
        with torch.no_grad():
            self.model.layers(input_ids=self.prompt, past_key_values=cache, use_cache=True)
        return cache

    @staticmethod
    def rewind(cache: Any) -> None:
        for layer in cache.layers:
            layer.cumulative_length.fill_(PROMPT)
        torch.compiler.cudagraph_mark_step_begin()

    def take_turn(self, cache: Any) -> None:
        """Before a timed step: other tokens."""
        self.turn = (self.turn + 1) % len(self.draws)
        self.token.copy_(self.draws[self.turn])
        self.rewind(cache)

    def run(self, layers: Callable[..., Any], cache: Any) -> torch.Tensor:
        with torch.no_grad():
            return layers(
                input_ids=self.token, position_ids=self.positions, past_key_values=cache, use_cache=True
            ).last_hidden_state

    def every_draw(self, layers: Callable[..., Any], cache: Any) -> list[torch.Tensor]:
        """The outputs of all the tokens to check; the first ones compile, warm up and capture."""
        outputs = []
        for draw in self.draws:
            self.token.copy_(draw)
            self.rewind(cache)
            outputs.append(self.run(layers, cache).clone())
        return [torch.stack(outputs)]


def decode(recorder: Recorder, launch: str) -> None:
    model = recorder.model
    no_graph = "the loop over experts reads their choices on the host: it is no single graph"
    for batch in model.scale.decode:
        step = DecodeStep(model, batch)
        check_experts = ExpertsCheck(model, step.token)
        check_output = OutputCheck(model, lambda step=step: step.every_draw(model.layers, step.fill()))
        torch._dynamo.reset()

        def build(name: str, step=step, experts=check_experts, output=check_output) -> tuple[Job, dict[str, Any]]:
            model.choose(name)
            cache, came_to = step.fill(), ""
            if name in FLAGGED:
                layers, came_to = model.flagged(name)
                inner = [module for path, module in layers.named_modules() if path.endswith(".experts")]
                checked = experts.without_gradients(inner[0])
            else:
                layers, checked = model.layers if launch == "eager" else compiled(model), experts(name)
            words = output(name, functools.partial(step.every_draw, layers, cache))
            words = f"{words}; {came_to}" if came_to else words
            reset = functools.partial(step.take_turn, cache)
            return recorder.job(name, functools.partial(step.run, layers, cache), reset), facts_of(checked, words)

        if launch == "compiled":
            recorder.record(batch, "forward", launch, build, {LOOP: no_graph})
        else:
            recorder.record(batch, "forward", launch, build, arms=(*IMPLEMENTATIONS, *FLAGGED))


def compiled(model: Model) -> Callable[..., Any]:
    """The layers as `generate` compiles them for a static cache; without a GPU traced alone, to try the script."""
    how = dict(mode="reduce-overhead") if model.device.type == "cuda" else dict(backend="aot_eager")
    return torch.compile(model.layers, fullgraph=True, dynamic=False, **how)


SECTIONS: dict[str, Callable[[Recorder], None]] = {
    "training": training,
    "forward": forward,
    "decode": functools.partial(decode, launch="eager"),
    "decode, compiled": functools.partial(decode, launch="compiled"),
}


def print_summary(rows: list[BenchmarkRow]) -> None:
    """Median milliseconds, a line per case and a column per implementation."""
    providers = list(dict.fromkeys(row.provider for row in rows))
    cases = {(row.mode, row.launch, row.num_tokens): {} for row in rows}
    for row in rows:
        cases[row.mode, row.launch, row.num_tokens][row.provider] = row
    print(f"\n{'median ms':36}" + "".join(f"{provider:>26}" for provider in providers))
    for (mode, launch, num_tokens), found in cases.items():
        times = {name: row.status if row.p50_ms is None else f"{row.p50_ms:.3f}" for name, row in found.items()}
        cells = (times.get(name, "-") for name in providers)
        print(f"{f'{mode} {launch} T={num_tokens}':36}" + "".join(f"{cell:>26}" for cell in cells))
    for row in rows:
        if row.p50_ms is None:
            print(f"  {row.mode} {row.launch} T={row.num_tokens} {row.provider}: {row.reason}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("output", type=Path, metavar="FILE.jsonl", help="where the rows go")
    parser.add_argument("--quick", action="store_true", help="a tiny model on any machine: a trial of the script")
    parser.add_argument("--section", action="append", choices=SECTIONS, help="run this one; all without it")
    parser.add_argument("--limit-s", type=float, default=510, help="start nothing new after this; default: %(default)s")
    arguments = parser.parse_args()
    if arguments.output.is_dir() or not os.access(arguments.output.parent, os.W_OK):
        parser.exit(2, f"{parser.prog}: error: cannot write {arguments.output}; name a file in a writable folder\n")
    if not arguments.quick and not torch.cuda.is_available():
        parser.exit(2, f"{parser.prog}: error: needs an NVIDIA GPU; --quick tries the script without one\n")
    try:
        register()
    except ImportError as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")
    interface = importlib.import_module("transformers.integrations.moe").ExpertsInterface
    interface.register(NOTHING, zeros_forward)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    recorder = Recorder(arguments.output, Model(QUICK if arguments.quick else FULL, device), arguments.limit_s)
    failed = False
    for name in arguments.section or SECTIONS:
        outcome = attempt(functools.partial(SECTIONS[name], recorder))
        if outcome.reason is not None:
            failed = True
            print(f"section {name}: {outcome.reason}", flush=True)
    print_summary(select(recorder.rows, BenchmarkRow))
    write_rows(arguments.output, recorder.rows)
    print(f"{time.monotonic() - recorder.begin:.0f} s; results: {arguments.output}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
