"""Checkpoints that survive a kill at any moment: tensors in safetensors, the rest in JSON, each renamed into place.

`checkpoint.json` names its tensor file and is renamed last, so it always names a whole one; older tensor files go only
after that. A tensor file's name carries its step and checksum, so a new one never replaces one that is still in use.
"""

from __future__ import annotations

import json
import zlib
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from moe_gpu.results import ExpertLoadRow, ResultsError, TrainingRow, from_json, to_json, write_atomically
from moe_gpu.training.config import TrainConfig
from moe_gpu.training.language_model import MoELanguageModel

FORMAT = "moe_gpu.checkpoint/1"
INDEX = "checkpoint.json"
TRAIN_ROWS = TrainingRow | ExpertLoadRow


class CheckpointError(ValueError):
    """A checkpoint cannot be read or continued; one line with the file, the cause and the remedy."""


@dataclass(frozen=True)
class Checkpoint:
    """A run after `step` steps. elapsed_s: training time so far. tensors: `model.*` and `optimizer.*`, on the CPU."""

    config: TrainConfig
    step: int
    elapsed_s: float
    text_sha256: str
    rows: list[TRAIN_ROWS]
    tensors: dict[str, torch.Tensor]

    def model_state(self) -> dict[str, torch.Tensor]:
        return _under("model.", self.tensors)

    def optimizer_state(self) -> dict[str, torch.Tensor]:
        return _under("optimizer.", self.tensors)


def _under(prefix: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def save_checkpoint(directory: str | Path, checkpoint: Checkpoint) -> Path:
    """Write it, make it the one that is loaded, remove what it replaces; returns the path of its JSON."""
    from safetensors.torch import save

    directory = Path(directory)
    content = save({name: tensor.detach().cpu().contiguous() for name, tensor in checkpoint.tensors.items()})
    crc32 = zlib.crc32(content)
    tensors_path = directory / f"checkpoint-{checkpoint.step:06d}-{crc32:08x}.safetensors"
    write_atomically(tensors_path, content)
    index = {
        "format": FORMAT,
        "step": checkpoint.step,
        "elapsed_s": checkpoint.elapsed_s,
        "tensors": tensors_path.name,
        "crc32": crc32,
        "text_sha256": checkpoint.text_sha256,
        "config": checkpoint.config.to_json(),
        "rows": [json.loads(to_json(row)) for row in checkpoint.rows],
    }
    write_atomically(directory / INDEX, json.dumps(index, allow_nan=False, indent=1).encode())
    leftovers = (".checkpoint-*.safetensors.*", f".{INDEX}.*")  # of a process that was killed while it wrote
    for pattern in ("checkpoint-*.safetensors", *leftovers):
        for path in directory.glob(pattern):
            if path != tensors_path:
                path.unlink(missing_ok=True)
    return directory / INDEX


def load_checkpoint(directory: str | Path) -> Checkpoint:
    """The newest whole checkpoint of a folder; CheckpointError in one line if it is missing, damaged or of no use."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    directory = Path(directory)
    path = directory / INDEX
    remedy = "train again without resuming"
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(index, dict) or index.get("format") != FORMAT:
            raise CheckpointError(f"{path} is not a checkpoint of this version ({FORMAT}); {remedy}")
        config = TrainConfig.from_json(index["config"])
        rows = [_row(values) for values in index["rows"]]
        path = directory / str(index["tensors"])
        content = path.read_bytes()
        if zlib.crc32(content) != index["crc32"]:
            raise CheckpointError(f"checkpoint {path} is damaged ({len(content)} bytes, wrong checksum); {remedy}")
        return Checkpoint(
            config, int(index["step"]), float(index["elapsed_s"]), str(index["text_sha256"]), rows, load(content)
        )
    except CheckpointError:
        raise
    except FileNotFoundError as error:
        raise CheckpointError(
            f"there is no checkpoint {path}; name the folder of an earlier run, or {remedy}"
        ) from error
    except OSError as error:
        raise CheckpointError(f"cannot read checkpoint {path}: {error.strerror}; {remedy}") from error
    except KeyError as error:
        raise CheckpointError(f"checkpoint {path} is damaged (no {error.args[0]!r}); {remedy}") from error
    except (ValueError, TypeError, ResultsError, SafetensorError) as error:
        raise CheckpointError(f"checkpoint {path} is damaged ({error}); {remedy}") from error


def _row(values: dict) -> TRAIN_ROWS:
    row = from_json(json.dumps(values))
    if not isinstance(row, TrainingRow | ExpertLoadRow):
        raise ResultsError(f"a {row.kind} row")
    return row


def check_resumable(checkpoint: Checkpoint, directory: Path, config: TrainConfig, text_sha256: str) -> None:
    """CheckpointError, naming what differs, unless `config` on this text continues the checkpoint's run."""
    name = config.difference(checkpoint.config)
    if name is not None:
        theirs, ours = getattr(checkpoint.config, name), getattr(config, name)
        raise CheckpointError(
            f"checkpoint in {directory} has {name}={theirs!r}, this run {name}={ours!r}; "
            "give the same value, or another output folder"
        )
    if checkpoint.text_sha256 != text_sha256:
        raise CheckpointError(
            f"checkpoint in {directory} was trained on another text (data={list(map(str, checkpoint.config.data))}); "
            "give the same files, or another output folder"
        )
    if checkpoint.step > config.steps:
        raise CheckpointError(
            f"checkpoint in {directory} is at step {checkpoint.step}, beyond steps={config.steps}; give more steps"
        )


def load_state(model: MoELanguageModel, state: dict[str, torch.Tensor], where: str | Path) -> None:
    """Copy a state dict into the model; CheckpointError names the first tensor that does not fit."""
    own = model.state_dict()
    for name in sorted(own.keys() | state.keys()):
        if name not in own or name not in state:
            side = "lacks" if name in own else "has, and this model lacks,"
            raise CheckpointError(f"checkpoint {where} {side} the tensor {name}; build the model from its own config")
        if own[name].shape != state[name].shape:
            raise CheckpointError(
                f"checkpoint {where}: {name} has shape {tuple(state[name].shape)}, "
                f"this model {tuple(own[name].shape)}; build the model from its own config"
            )
    model.load_state_dict(state)


def optimizer_tensors(model: MoELanguageModel, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """AdamW's state by parameter name: `NAME.exp_avg`, `NAME.exp_avg_sq`, `NAME.step`."""
    return {
        f"{name}.{key}": tensor
        for name, parameter in model.named_parameters()
        for key, tensor in optimizer.state.get(parameter, {}).items()
    }


def load_optimizer(
    model: MoELanguageModel, optimizer: torch.optim.Optimizer, tensors: dict[str, torch.Tensor], where: str | Path
) -> None:
    """The inverse of `optimizer_tensors`; CheckpointError where a parameter's state is missing."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state: dict[int, dict[str, torch.Tensor]] = {}
    for index, parameter in enumerate(parameters):
        name = names[id(parameter)]
        try:
            state[index] = {key: tensors[f"{name}.{key}"] for key in ("step", "exp_avg", "exp_avg_sq")}
        except KeyError as error:
            raise CheckpointError(f"checkpoint {where} lacks the optimiser's tensor {error.args[0]}") from error
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def load_model(directory: str | Path, device: torch.device | str = "cpu") -> MoELanguageModel:
    """The trained model of a folder, on `device`; CheckpointError as for `load_checkpoint`."""
    checkpoint = load_checkpoint(directory)
    model = MoELanguageModel(replace(checkpoint.config, device=str(device)))
    load_state(model, checkpoint.model_state(), directory)
    return model
