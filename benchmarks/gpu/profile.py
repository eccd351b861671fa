"""The kernels that an action launches, and their times."""

from collections.abc import Callable
from typing import Any

from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity
from torch.profiler import profile as torch_profile

from benchmarks import machine

SLOWEST = 30
NAME_LETTERS = 160  # names of templates are longer


def profile(action: Callable[[], object], times: int) -> dict[str, Any]:
    """Profile an action `times` times; figures per action.

    Returns:
        `busy_ms`: sum of kernel times, including copies and fills; `launches`: number of kernels; `kernels`: the thirty
        slowest, with `name`, `ms` and `calls`. On a CPU, PyTorch operations instead of kernels.
    """
    on_gpu = machine.device().type == "cuda"
    machine.synchronize()
    with torch_profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as profiled:
        for _ in range(times):
            action()
        machine.synchronize()
    return figures(profiled.key_averages(), DeviceType.CUDA if on_gpu else DeviceType.CPU, times)


def figures(events: Any, device_type: DeviceType, times: int) -> dict[str, Any]:
    """The result of `profile`, from the profiler's averages by name."""
    attribute = "self_cpu_time_total" if device_type == DeviceType.CPU else "self_device_time_total"
    kernels = [
        (getattr(event, attribute) / 1e3 / times, event.count / times, event.key[:NAME_LETTERS])
        for event in events
        # a range such as "Optimizer.step" contains kernels, and is not one
        if event.device_type == device_type and not event.is_user_annotation and getattr(event, attribute) > 0
    ]
    kernels.sort(reverse=True)
    return {
        "busy_ms": sum(milliseconds for milliseconds, _, _ in kernels),
        "launches": sum(calls for _, calls, _ in kernels),
        "kernels": [
            {"name": name, "ms": milliseconds, "calls": calls} for milliseconds, calls, name in kernels[:SLOWEST]
        ],
    }
