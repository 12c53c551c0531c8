"""How many bytes a piece of work takes: the peak of torch's allocator, and what a forward pass keeps for its backward pass.

On CUDA the allocator's own statistics say the peak, on a CPU the allocations that torch's profiler records. What a kernel
allocates without torch is not in it.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import resource
from collections.abc import Callable, Iterator

import psutil
import torch
from torch import Tensor, nn

from sovit.train.loop import is_out_of_memory


def peak_bytes(work: Callable[[], object], device: str) -> int:
    """Peak of what torch's allocator holds during `work`, above what it held before, in bytes.

    Raises what `work` raises; on a CPU, MemoryError or RuntimeError for what the machine has no memory left for.
    """
    if device.startswith("cuda"):
        torch.cuda.empty_cache()
        held = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        work()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated(device) - held
    with _quiet(), _bounded_memory(), torch.autograd.profiler.profile(profile_memory=True) as recorded:
        work()
    events = recorded.kineto_results.events()
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    return max(itertools.accumulate(size for _, size in changes), default=0)


def unless_out_of_memory(measure: Callable[[], dict]) -> dict:
    """Return measure(), or {status, error} where it does not fit into memory."""
    try:
        return measure()
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return dict(status="out_of_memory", error=(str(error) or "out of memory").splitlines()[0])


def count_saved(model: nn.Module, images: Tensor, dtype: torch.dtype) -> int:
    """Bytes of the storages, each once, that model(images) keeps for its backward pass, parameters and images apart."""
    held = {tensor.untyped_storage()._cdata for tensor in (*model.parameters(), images)}
    kept = {}  # the tensors are kept, too: a storage that was freed could give its place to the next one

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in held:
            kept[storage._cdata] = storage.nbytes(), tensor
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        torch.autocast(images.device.type, dtype, enabled=dtype != torch.float32),
    ):
        model(images)
    return sum(size for size, _ in kept.values())


@contextlib.contextmanager
def _bounded_memory() -> Iterator[None]:
    """Let an allocation beyond the machine's free memory fail, where the kernel would kill the process."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    free = psutil.Process().memory_info().vms + psutil.virtual_memory().available
    limits = [limit for limit in (free, soft, hard) if limit != resource.RLIM_INFINITY]
    resource.setrlimit(resource.RLIMIT_AS, (min(limits), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep what torch's profiler writes to standard error, at its start and end, from there."""
    kept = os.dup(2)
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
