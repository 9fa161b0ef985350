"""A MoE language model trained on real text: configuration, tokens, model, checkpoints, the loop, samples."""

from moe_gpu.training.checkpoint import Checkpoint, CheckpointError, load_checkpoint, load_model
from moe_gpu.training.config import TrainConfig
from moe_gpu.training.config_file import assignments, config_reference, read_config, with_fields
from moe_gpu.training.expert_load import ExpertLoads
from moe_gpu.training.language_model import MoELanguageModel, record_trace
from moe_gpu.training.loop import Trainer, TrainResult, evaluate, next_token_loss, train
from moe_gpu.training.sampling import generate
from moe_gpu.training.text import Text, load_text

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "ExpertLoads",
    "MoELanguageModel",
    "Text",
    "TrainConfig",
    "TrainResult",
    "Trainer",
    "assignments",
    "config_reference",
    "evaluate",
    "generate",
    "load_checkpoint",
    "load_model",
    "load_text",
    "next_token_loss",
    "read_config",
    "record_trace",
    "train",
    "with_fields",
]
