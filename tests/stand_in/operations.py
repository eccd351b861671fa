"""PyTorch's operations on the stand-in for a GPU: queued where PyTorch would launch kernels, computed on the CPU.

Each of PyTorch's CUDA operations is replaced by one that allocates its results as ever and queues the rest. A recorded
graph computes it again at each replay, on whatever the same addresses hold by then.
"""

import atexit
import ctypes
import gc
import itertools
import os
import sys
import traceback
import warnings
from collections.abc import Callable
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

LIBRARY = ctypes.CDLL(os.environ["STAND_IN_LIBRARY"], mode=ctypes.RTLD_GLOBAL)
LIBRARY.stand_in_enqueue.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_ulonglong]

MOST_PRODUCTS = 3e8  # a measurement of the device multiplies more, whose result nobody reads
DRAWN = 1 << 14  # how far a draw advances the generator; a multiple of 4, more than PyTorch's kernels do
# these wait for the device, since the data decide the shape of their results
WAITING = {"nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive", "bincount", "multinomial"}
# PyTorch's own code for these launches no kernel of its own, or no kernel that matters
KEPT = {
    *("as_strided", "as_strided_", "copy_", "empty", "empty_strided", "is_pinned", "is_set_to", "_local_scalar_dense"),
    *("new_empty", "_pin_memory", "pin_memory", "record_stream", "_reshape_alias", "resize_", "set_", "view"),
}
OTHER_LIBRARIES = ("cudnn", "_cslt", "sparse", "nested", "quantize", "_flash", "_efficient", "_scaled_dot", "_fft")

_work: dict[int, tuple[str, Callable[[], object], bool]] = {}
_numbers = itertools.count(1)


class Address:
    """A tensor on the device, without keeping its memory."""

    def __init__(self, tensor: Tensor) -> None:
        self._pointer = tensor.data_ptr()
        self._shape, self._stride, self._dtype = tensor.shape, tensor.stride(), tensor.dtype

    def on_cpu(self) -> Tensor:
        """A tensor on the CPU in the same memory."""
        if 0 in self._shape:
            return torch.empty_strided(self._shape, self._stride, dtype=self._dtype)
        last = sum((size - 1) * stride for size, stride in zip(self._shape, self._stride, strict=True))
        memory = (ctypes.c_char * ((last + 1) * self._dtype.itemsize)).from_address(self._pointer)
        return torch.frombuffer(memory, dtype=self._dtype).as_strided(self._shape, self._stride)


@contextmanager
def executing(name: str):
    """Context manager for queued work: an error ends the process, as a fault on a GPU does.

    Python collects no garbage meanwhile: memory and graphs that are freed then would wait for this very work.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        with torch.no_grad():
            yield
    except BaseException:  # noqa: BLE001 - nobody could catch it: C++ has called
        print(f"stand-in: {name} failed", file=sys.stderr)
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(70)
    finally:
        if was_enabled:
            gc.enable()


@ctypes.CFUNCTYPE(None, ctypes.c_ulonglong)
def _run(number):
    name, work, is_recorded = _work[number]
    with executing(name):
        work()
    if not is_recorded:
        del _work[number]


def enqueue(name: str, work: Callable[[], object]) -> None:
    """Put work into the current stream's queue, or into the graph that it records."""
    number = next(_numbers)
    _work[number] = name, work, torch.cuda.is_current_stream_capturing()
    LIBRARY.stand_in_enqueue(torch.cuda.current_stream().cuda_stream, name.encode(), number)


def install() -> None:
    """Replace PyTorch's CUDA operations in this process."""
    LIBRARY.stand_in_set_work(_run)
    atexit.register(LIBRARY.stand_in_end)
    install.library = library = torch.library.Library("aten", "IMPL")  # which undoes it at its end
    copy = torch.library.get_kernel("aten::copy_", "CUDA")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there are operations already
        for name in torch._C._dispatch_get_registrations_for_dispatch_key("CUDA"):
            operation = _replaced(name)
            if operation is not None:
                library.impl(name.removeprefix("aten::"), _queued(operation), "CUDA")
        library.impl("copy_", _copying(copy), "CUDA")


def _replaced(name: str):
    """An operation that is to be replaced, or None."""
    namespace, _, full = name.partition("::")
    base, _, overload = full.partition(".")
    if namespace != "aten" or base in KEPT or any(part in base for part in OTHER_LIBRARIES):
        return None
    operation = getattr(getattr(torch.ops.aten, base, None), overload or "default", None)
    is_view = operation is not None and any(
        each.alias_info is not None and not each.alias_info.is_write for each in operation._schema.returns
    )
    return None if is_view else operation


def _queued(operation):
    schema = operation._schema
    name = str(operation)
    compute = _on_cpu(operation)
    names = [argument.name for argument in schema.arguments]
    written = [each.name for each in schema.arguments if each.alias_info is not None and each.alias_info.is_write]
    draws = "generator" in names

    def queued(*args, **kwargs):
        given = dict(zip(names, args, strict=False)) | kwargs
        if draws:
            return _draw(operation, given, written)
        if written or not schema.returns:
            results = [given.get(each) for each in written]
            if any(isinstance(each, Tensor) and not each.numel() for each in results):  # of no size, as `out` may be
                shapes = tree_flatten(compute(*tree_map(_as_meta, args), **tree_map(_as_meta, kwargs)))[0]
                for result, like in zip(results, shapes, strict=False):
                    if result.shape != like.shape:
                        result.resize_(like.shape)
            _enqueue_call(name, compute, args, kwargs)
            results = results[: len(schema.returns)]
            return results[0] if len(results) == 1 else tuple(results) or None
        if schema.name.removeprefix("aten::") in WAITING:
            return _wait_and_call(name, compute, args, kwargs)
        try:
            shapes, structure = tree_flatten(compute(*tree_map(_as_meta, args), **tree_map(_as_meta, kwargs)))
        except (NotImplementedError, RuntimeError):  # the shape depends on data
            return _wait_and_call(name, compute, args, kwargs)
        results = [_empty(like) for like in shapes]
        _enqueue_call(name, compute, args, kwargs, results)
        return tree_unflatten(results, structure)

    return queued


def _on_cpu(operation):
    """A function that computes what an operation does on the GPU; other code may do it on the CPU."""
    packet, schema = operation.overloadpacket, operation._schema
    tensors = [index for index, argument in enumerate(schema.arguments) if str(argument.type) == "Tensor"]

    def call(*args, **kwargs):
        has_numbers = any(index < len(args) and isinstance(args[index], int | float) for index in tensors)
        return (packet if has_numbers else operation)(*args, **kwargs)  # PyTorch unpacks numbers from tensors

    def product(left, right, *dtype, out=None):
        if left.numel() * right.shape[1] > MOST_PRODUCTS and left.device.type == "cpu":
            return left.new_zeros(len(left), right.shape[1]) if out is None else out
        wide = [each.to(*dtype) for each in (left, right)] if dtype else [left, right]
        return torch.mm(*wide) if out is None else torch.mm(*wide, out=out)

    def sum_of_product(addend, left, right, dtype, *, beta=1, alpha=1, out=None):
        result = beta * addend + alpha * (left.to(dtype) @ right.to(dtype))
        return result if out is None else out.copy_(result)

    def softmax(x, dim, half_to_float):
        return operation(x.float() if half_to_float else x, dim, False)

    others = {
        "mm": product,
        "mm.dtype": product,
        "mm.out": product,
        "mm.dtype_out": product,
        "addmm.dtype": sum_of_product,
        "addmm.dtype_out": sum_of_product,
        "_softmax": softmax,
        "_log_softmax": softmax,
    }
    return others.get(".".join(filter(None, (packet.__name__, schema.overload_name))), call)


def _enqueue_call(name, compute, args, kwargs, results=()):
    args, kwargs = tree_map(_address, args), tree_map(_address, kwargs)
    places = [Address(result) if isinstance(result, Tensor) else None for result in results]

    def work():
        found, _ = tree_flatten(compute(*tree_map(_tensor, args), **tree_map(_tensor, kwargs)))
        for place, value in zip(places, found, strict=False):
            if place is not None:
                place.on_cpu().copy_(value)

    enqueue(name, work)


def _wait_and_call(name, compute, args, kwargs):
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError(f"{name}: operation not permitted when stream is capturing")
    torch.cuda.current_stream().synchronize()
    args, kwargs = tree_map(_address, args), tree_map(_address, kwargs)
    with torch.no_grad():
        found = compute(*tree_map(_tensor, args), **tree_map(_tensor, kwargs))
    results = tree_map(lambda each: _empty(each) if isinstance(each, Tensor) else each, found)
    for result, value in zip(tree_flatten(results)[0], tree_flatten(found)[0], strict=True):
        if isinstance(value, Tensor):
            Address(result).on_cpu().copy_(value)
    return results


def _draw(operation, given, written):
    """Random numbers, drawn at once from where the GPU's generator is; they arrive in their turn."""
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError(f"{operation}: the stand-in draws no random numbers in a recording")
    generator = given.pop("generator", None) or torch.cuda.default_generators[torch.cuda.current_device()]
    on_cpu = torch.Generator()
    on_cpu.manual_seed((generator.initial_seed() * 1_000_003 + generator.get_offset()) % 2**63)
    generator.set_offset(generator.get_offset() + DRAWN)
    if not written:
        return _wait_and_call(str(operation), lambda **call: operation(**call, generator=on_cpu), (), given)
    result = given.pop(written[0])
    drawn = torch.empty(result.shape, dtype=result.dtype)
    with torch.no_grad():
        operation(**{written[0]: drawn}, **given, generator=on_cpu)
    place = Address(result)
    enqueue(str(operation), lambda: place.on_cpu().copy_(drawn))
    return result


def _copying(copy):
    """`copy_`: PyTorch's own between host and device, where CUDA's runtime copies; on the device it is queued."""
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)

    def copying(target, source, non_blocking=False):
        if target.is_cuda and source.is_cuda:
            places = Address(target), Address(source)
            enqueue("aten::copy_", lambda: places[0].on_cpu().copy_(places[1].on_cpu()))
            return target
        source = source.expand_as(target)
        if target.dtype == source.dtype and target.is_contiguous() and source.is_contiguous():
            copy.call_boxed(keys, target, source, non_blocking)
        elif source.is_cuda:
            on_device = torch.empty(target.shape, dtype=target.dtype, device=source.device)
            arrived = torch.empty_like(on_device, device="cpu")
            copying(on_device, source)
            copy.call_boxed(keys, arrived, on_device, False)
            target.copy_(arrived)
        else:
            arrived = torch.empty(target.shape, dtype=source.dtype, device=target.device)
            copy.call_boxed(keys, arrived, source.contiguous(), non_blocking)
            copying(target, arrived)
        return target

    return copying


def _empty(like):
    return torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device="cuda") if like is not None else None


def _address(value):
    if not isinstance(value, Tensor):
        return torch.device("cpu") if isinstance(value, torch.device) else value
    return Address(value) if value.is_cuda else value.detach().clone()  # a kernel has a number's value at its launch


def _tensor(value):
    return value.on_cpu() if isinstance(value, Address) else value


def _as_meta(value):
    if isinstance(value, Tensor) and (value.is_cuda or value.dim()):
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
    return torch.device("meta") if isinstance(value, torch.device) else value
