"""How transformers knows of this library: one name in its tables of experts' implementations."""

from __future__ import annotations

import functools
import importlib

from torch import nn

from moe_gpu.huggingface.forward import experts_forward
from moe_gpu.huggingface.layout import Conventions, fp8_gate_of

NAME = "moe_gpu"
"""The value of `experts_implementation` that chooses this library."""
_REMEDY = "pip install 'moe-gpu[hf]' (transformers>=5.7)"


@functools.cache
def register() -> Conventions:
    """Make `experts_implementation="moe_gpu"` known to transformers, FP8 experts included; once a process.

    Raises ImportError where transformers is missing or has no experts interface, with the remedy.
    """
    try:
        moe = importlib.import_module("transformers.integrations.moe")
        fp8 = importlib.import_module("transformers.integrations.finegrained_fp8")
        activations = importlib.import_module("transformers.activations")
        interfaces = (moe.ExpertsInterface, fp8.FP8ExpertsInterface)
    except (ImportError, AttributeError) as error:
        raise ImportError(f"transformers with its experts interface is not here ({error}); {_REMEDY}") from error
    functions: dict[type, str] = {nn.SiLU: "silu", nn.ReLU: "relu"}
    for name, function in (("SiLUActivation", "silu"), ("GELUActivation", "gelu"), ("GELUTanh", "gelu_tanh")):
        if hasattr(activations, name):
            functions[getattr(activations, name)] = function
    # Without a default gate to compare with, every module's own gate is called.
    default_gate = getattr(moe, "_default_apply_gate", None)
    conventions = Conventions(default_gate, functions, *fp8_gate_of(getattr(fp8, "FP8Experts", object)))
    forward = functools.partial(experts_forward, conventions)
    for interface in interfaces:
        interface.register(NAME, forward)
    return conventions
