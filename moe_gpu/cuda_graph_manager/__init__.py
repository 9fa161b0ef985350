"""CUDA graphs of calls that repeat, streams that fork and join, and work beside other work where that pays."""

from moe_gpu.cuda_graph_manager.capture import CaptureError
from moe_gpu.cuda_graph_manager.manager import CUDAGraphManager
from moe_gpu.cuda_graph_manager.scheduler import Arm, BatchScheduler
from moe_gpu.cuda_graph_manager.streams import StreamManager

__all__ = ["Arm", "BatchScheduler", "CUDAGraphManager", "CaptureError", "StreamManager"]
