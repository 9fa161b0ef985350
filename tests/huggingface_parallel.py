"""Two gloo processes: transformers' tensor and expert parallelism and FSDP around experts that moe_gpu serves.

`python -m tests.huggingface_parallel` starts both and fails where a rank does.
"""

from __future__ import annotations

import inspect
import sys
import tempfile
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from moe_gpu.huggingface import enable
from tests.huggingface_cases import Outcome, check_outcome, experts_of, make_model, run

WORLD = 2


def parallelise(expert_parallel: bool) -> Callable[[nn.Module], None]:
    """transformers' own sharding of a model, by its plan for tensor or for expert parallelism."""

    def apply(model: nn.Module) -> None:
        from transformers.distributed import DistributedConfig
        from transformers.distributed.tensor_parallel import apply_tensor_parallelism

        mesh = init_device_mesh("cpu", (WORLD,))
        if "tp_plan" not in inspect.signature(apply_tensor_parallelism).parameters:  # transformers 5.17
            model.config.distributed_config = DistributedConfig(
                tp_plan="auto", tp_size=WORLD, enable_expert_parallel=expert_parallel
            )
            apply_tensor_parallelism(model, mesh)
        else:
            config = DistributedConfig(tp_size=WORLD, ep_size=WORLD if expert_parallel else 1)
            model.config.distributed_config = config
            tp_plan, ep_plan, _ = model._resolve_parallel_plans(config)
            apply_tensor_parallelism(model, mesh, tp_plan)
            if expert_parallel:
                expert_parallelism = import_module("transformers.distributed.expert_parallel")
                expert_parallelism.apply_expert_parallelism(model, mesh, mesh, ep_plan)
        experts = experts_of(model)[0]
        local = experts.down_proj.to_local().shape
        assert local[0] == (3 if expert_parallel else 6), local

    return apply


def shard_fully(model: nn.Module) -> None:
    mesh = init_device_mesh("cpu", (WORLD,))
    for experts in experts_of(model):
        fully_shard(experts, mesh=mesh)
        assert type(experts).__name__.startswith("FSDP")  # another class than the one that was decorated
    fully_shard(model, mesh=mesh)


def whole(outcome: Outcome) -> Outcome:
    def gather(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor

    return Outcome(gather(outcome.logits), {name: gather(grad) for name, grad in outcome.gradients.items()})


def check(name: str, apply: Callable[[nn.Module], None]) -> None:
    """Logits and the gradients of the experts' weights of a parallel model are those of the whole one."""
    expected = run(make_model(name))
    model = make_model(name)
    apply(model)
    report = enable(model)
    assert len(report.covered) == 2
    got = whole(run(model))
    for outcome in (expected, got):
        for parameter in [name for name in outcome.gradients if ".experts." not in name]:
            del outcome.gradients[parameter]
    assert len(expected.gradients) >= 4
    check_outcome(got, expected)


CASES = {
    "tensor parallel": ("qwen3_moe", parallelise(expert_parallel=False)),
    "expert parallel": ("qwen3_moe", parallelise(expert_parallel=True)),
    "expert parallel, gpt-oss": ("gpt_oss", parallelise(expert_parallel=True)),
    "fully sharded": ("qwen3_moe", shard_fully),
}


def worker(rank: int, store: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=WORLD)
    for case, (name, apply) in CASES.items():
        check(name, apply)
        if rank == 0:
            print(f"{case}: right", flush=True)
    dist.barrier()  # a process that ends while the other still talks to it aborts now and then
    dist.destroy_process_group()


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.spawn(worker, (str(Path(folder) / "store"),), nprocs=WORLD)
    return 0


if __name__ == "__main__":
    sys.exit(main())
