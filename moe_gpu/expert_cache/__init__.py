"""Experts beyond device memory: hot ones in slots there, all of them in pinned host memory, output the same to the bit.

**Which experts a step needs** is known on the device only, once it has routed. A layer with a slot for every expert
asks nothing: expert e lies in slot e, and the layer runs (and captures in a CUDA graph) as it does without a budget.
Any other layer copies its E + 1 row offsets to the host and waits for that copy alone: the one place where the host
waits for the device on the path of a step. It cannot be avoided without guessing, since only the host can start copies
of weights that are missing; a layer's shared expert is launched before the wait, so that the device has work meanwhile.
Such a layer cannot be captured, and says so: the host takes no part in a replay.

**Slots and waves.** A layer's slots are stacked weights (S, N, K), so a wave is a grouped product of S experts. A table
expert -> bin, kept on the device, turns expert ids into bins; sorting the routes by bin gives row maps and offsets for
all waves at once, bin = wave * S + slot. The first wave is what is resident; it computes while the lane copies what is
missing into slots that the step does not need. Where a step needs more experts than there are slots, further waves
reuse slots: each copy waits for the event of the last computation that read its slot, each wave for its copies.

**To the bit.** Every wave writes its experts' rows into one buffer and the weighted sum over each token's rows is taken
once, over all of them, in the order of k: no partial sums, so nothing depends on which expert was where, or when. The
rows themselves are equal because kernel and tile are chosen as for all experts, rows keep their place within their
expert, and no kernel lets one row see another.

**What stays** is decided on the host between steps (`book.py`, `policies.py`). The budget is divided among the layers
by the same share of each one's experts; a layer evicts its own experts only, since layers run one after another and a
common order of eviction would push out just what the next layer is about to ask for. Each policy ranks by a history of
requests that does not depend on what is resident, so shadows of the policies cost a set each and the best one serves; a
few layers stand for all. A prefetch must expect to save more copies than it costs, and all of them together must have,
the host's time to choose them counted in copies too: a decoding step has less of it to spare than the device.

`simulate` replays routing traces through the same bookkeeping without weights.
"""

from moe_gpu.expert_cache.budget import HbmBudgetError, HbmMemoryError
from moe_gpu.expert_cache.cache import ExpertCache, ExpertCacheStats, LayerCache
from moe_gpu.expert_cache.home import apply_around_weights
from moe_gpu.expert_cache.policies import POLICIES

__all__ = [
    "POLICIES",
    "ExpertCache",
    "ExpertCacheStats",
    "HbmBudgetError",
    "HbmMemoryError",
    "LayerCache",
    "apply_around_weights",
]
