"""A small MoE language model trained on real text: configuration, text, model, checkpoints and the loop."""

from moe_gpu.training.checkpoint import Checkpoint, CheckpointError, load_checkpoint, load_model
from moe_gpu.training.config import TrainConfig
from moe_gpu.training.language_model import MoELanguageModel, record_trace
from moe_gpu.training.loop import Trainer, TrainResult, evaluate, next_byte_loss, train
from moe_gpu.training.text import Text, load_text

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "MoELanguageModel",
    "Text",
    "TrainConfig",
    "TrainResult",
    "Trainer",
    "evaluate",
    "load_checkpoint",
    "load_model",
    "load_text",
    "next_byte_loss",
    "record_trace",
    "train",
]
