"""Green contexts by the CUDA driver's own functions: disjoint parts of the SMs, each with a stream, sizes read back.

(CUDA Driver API, "Green Contexts".) `libcuda` is opened when partitions are asked for, never by importing.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

from moe_gpu.slices.plan import BackendUnavailableError

LIBRARY = "libcuda.so.1"
_FUNCTIONS = (
    "cuDeviceGet",
    "cuDeviceGetDevResource",
    "cuDevSmResourceSplitByCount",
    "cuDevResourceGenerateDesc",
    "cuGreenCtxCreate",
    "cuGreenCtxStreamCreate",
    "cuGreenCtxGetDevResource",
    "cuGreenCtxDestroy",
    "cuStreamSynchronize",
    "cuStreamDestroy_v2",
)
_SM = 1  # CU_DEV_RESOURCE_TYPE_SM
_DEFAULT_STREAM = 1  # CU_GREEN_CTX_DEFAULT_STREAM
_NON_BLOCKING = 1  # CU_STREAM_NON_BLOCKING
# CUdevResource: the type and padding fill 96 bytes, then comes the number of SMs. Its whole size differs by version
# (144 or more bytes), so each is held alone in a buffer that is larger than any.
_SM_COUNT_AT, _RESOURCE_BYTES = 96, 512


class _Resource:
    """A CUdevResource: opaque but for its number of SMs."""

    def __init__(self) -> None:
        self.buffer = ctypes.create_string_buffer(_RESOURCE_BYTES)

    @property
    def sms(self) -> int:
        return ctypes.c_uint.from_buffer(self.buffer, _SM_COUNT_AT).value


def _library() -> ctypes.CDLL:
    try:
        library = ctypes.CDLL(LIBRARY)
    except OSError as error:
        raise BackendUnavailableError(
            f"green contexts need the NVIDIA driver, and {LIBRARY} cannot be opened; use backend='cta'"
        ) from error
    missing = [name for name in _FUNCTIONS if not hasattr(library, name)]
    if missing:
        raise BackendUnavailableError(
            f"this driver has no {missing[0]}: green contexts need driver 550 or newer; update it or use backend='cta'"
        )
    return library


class GreenPartitions:
    """Disjoint partitions of a GPU of the sizes asked for. `sms`: what each got; `streams`: a CUstream in each.

    The device's primary context must be current. Raises BackendUnavailableError for a split that the driver refuses,
    having given back what it had made.
    """

    def __init__(self, index: int, sizes: Sequence[int]) -> None:
        self._cuda = _library()
        self.index, self.asked = index, tuple(sizes)
        self._contexts: list[ctypes.c_void_p] = []
        self.sms: list[int] = []
        self.streams: list[int] = []
        try:
            self._make(index, sizes)
        except BaseException:
            self.close()
            raise

    @staticmethod
    def require() -> None:
        """Raise BackendUnavailableError where the driver has no green contexts."""
        _library()

    def _make(self, index: int, sizes: Sequence[int]) -> None:
        device = ctypes.c_int()
        self._call("cuDeviceGet", ctypes.byref(device), index)
        rest = _Resource()
        self._call("cuDeviceGetDevResource", device, rest.buffer, _SM)
        for number, size in enumerate(sizes):
            if size > rest.sms:
                raise BackendUnavailableError(
                    f"green context {number} asks for {size} SMs, {rest.sms} are left on GPU {index}; ask for fewer"
                )
            part, remaining = _Resource(), _Resource()
            groups = ctypes.c_uint(1)
            self._call(
                "cuDevSmResourceSplitByCount", part.buffer, ctypes.byref(groups), rest.buffer, remaining.buffer, 0, size
            )
            if groups.value != 1:
                raise BackendUnavailableError(f"the driver gives no green context of {size} SMs on GPU {index}")
            context = self._context(device, part)
            stream = ctypes.c_void_p()
            self._call("cuGreenCtxStreamCreate", ctypes.byref(stream), context, _NON_BLOCKING, 0)
            self.streams.append(int(stream.value or 0))
            self.sms.append(self._resource_of(context).sms)
            if number + 1 < len(sizes) and remaining.sms:
                # A remainder can be split again only once a context holds it.
                rest = self._resource_of(self._context(device, remaining))
            else:
                rest = remaining

    def _context(self, device: ctypes.c_int, resource: _Resource) -> ctypes.c_void_p:
        description, context = ctypes.c_void_p(), ctypes.c_void_p()
        self._call("cuDevResourceGenerateDesc", ctypes.byref(description), resource.buffer, 1)
        self._call("cuGreenCtxCreate", ctypes.byref(context), description, device, _DEFAULT_STREAM)
        self._contexts.append(context)
        return context

    def _resource_of(self, context: ctypes.c_void_p) -> _Resource:
        resource = _Resource()
        self._call("cuGreenCtxGetDevResource", context, resource.buffer, _SM)
        return resource

    def _call(self, name: str, *arguments: object) -> None:
        status = getattr(self._cuda, name)(*arguments)
        if status:
            raise BackendUnavailableError(
                f"green contexts: {name} failed with CUDA error {status}; use backend='cta' or other sizes"
            )

    def in_order_of(self, sizes: Sequence[int]) -> list[tuple[int, int]]:
        """SMs and stream of each of these sizes, which are those that were asked for in another order."""
        parts = list(zip(self.sms, self.streams, strict=True))
        places = sorted(range(len(sizes)), key=sizes.__getitem__, reverse=True)
        return [parts[places.index(i)] for i in range(len(sizes))]

    def wait(self, stream: int) -> None:
        """Wait for the work in one of the streams."""
        self._call("cuStreamSynchronize", ctypes.c_void_p(stream))

    def close(self) -> None:
        """Destroy streams and contexts; the work in them must have ended. Of memory the driver gives nothing back."""
        for stream in self.streams:
            self._cuda.cuStreamDestroy_v2(ctypes.c_void_p(stream))
        for context in reversed(self._contexts):
            self._cuda.cuGreenCtxDestroy(context)
        self.streams, self._contexts = [], []


_idle: dict[tuple[int, tuple[int, ...]], list[GreenPartitions]] = {}


def take_partitions(index: int, sizes: Sequence[int]) -> GreenPartitions:
    """Partitions of these sizes, largest first, that nothing else uses: kept ones of the same split, else new ones.

    Partitions live as long as the process. A driver of series 580 keeps 4 MiB of every green context that it ever
    made, destroyed or not, so a plan that goes to and fro would take more and more memory.
    """
    kept = _idle.get((index, tuple(sorted(sizes, reverse=True))))
    return kept.pop() if kept else GreenPartitions(index, sorted(sizes, reverse=True))


def keep_partitions(partitions: GreenPartitions) -> None:
    """Hand partitions back for whoever takes this split next. Waits for the work in them."""
    for stream in partitions.streams:  # a device's synchronize does not wait for graphs replayed in a green context
        partitions.wait(stream)
    _idle.setdefault((partitions.index, partitions.asked), []).append(partitions)
