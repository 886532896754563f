"""Process groups outside any world, as torch.distributed makes them inside of one.

A *channel* is a `ProcessGroup` with one backend: gloo for tensors on the host, NCCL for those on a
GPU. Nothing here is registered anywhere; who holds a channel may use it, and it goes with its last
reference.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore


def host_channel(store: Any, rank: int, size: int, timeout: timedelta, gloo_device: Any) -> Any:
    """A gloo channel; blocks until all have come."""
    kinds = dist.ProcessGroup.BackendType
    options: Any = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
    options._devices, options._threads, options._timeout = [gloo_device], 1, timeout
    gloo = dist.ProcessGroupGloo(PrefixStore("host", store), rank, size, options)
    host = dist.ProcessGroup(store, rank, size)
    host._set_default_backend(kinds.GLOO)
    host._register_backend(torch.device("cpu"), kinds.GLOO, gloo)
    return host


def cuda_channel(store: Any, rank: int, size: int, timeout: timedelta, device: torch.device) -> Any:
    """An NCCL channel. Its communicator is connected at once, or else the first step would pay."""
    torch.cuda.set_device(device)  # of this thread
    kinds = dist.ProcessGroup.BackendType
    options: Any = dist.ProcessGroupNCCL.Options()
    options._timeout, options.config.blocking = timeout, 0
    nccl = dist.ProcessGroupNCCL(PrefixStore("device", store), rank, size, options)
    nccl.eager_connect_single_device(device)
    channel = dist.ProcessGroup(store, rank, size)
    channel._set_default_backend(kinds.NCCL)
    channel._register_backend(device, kinds.NCCL, nccl)
    return channel
