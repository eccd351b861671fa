"""PyTorch's private names are used in one file only, and a PyTorch that lacks one of them still works."""

import ast
import platform
import re
from pathlib import Path

import pytest
import torch

from kernels import cpp, lamb_step, masked_cross_entropy, torch_private
from kernels.lamb import eager, reference

ROOT = Path(__file__).parents[1]


def private_names(source):
    """Private PyTorch names (leading underscore) that a file imports, accesses as attributes, or imports by string."""
    tree = ast.parse(source)
    bound, found = {}, set()  # names bound in the file, and their full paths
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
            paths = [alias.name if alias.asname else alias.name.partition(".")[0] for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            paths = [f"{node.module}.{alias.name}" for alias in node.names]
            found |= set(paths)
        else:
            continue
        bound |= {alias.asname or path.rpartition(".")[2]: path for alias, path in zip(node.names, paths, strict=True)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            found.add(_path(node, bound))
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            found |= {str(arg.value) for arg in node.args if isinstance(arg, ast.Constant)}
    return {path for path in found if re.match(r"torch\.(.*\.)?_(?!_)", path)}


def _path(node, bound):
    """The dotted path of an attribute, starting at the module that its first name was imported from; "" if unknown."""
    parts = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    first = bound.get(node.id, "") if isinstance(node, ast.Name) else ""
    return ".".join([first, *reversed(parts)]) if first else ""


def test_the_scan_sees_every_way_to_a_private_name():
    assert private_names(
        "import importlib, torch\n"
        "import torch._dynamo.config\n"
        "import torch.distributed as dist\n"
        "import os._private\n"
        "from torch._ops import OpOverload\n"
        "from torch import Tensor, _C\n"
        "from torch.distributed.distributed_c10d import _resolve_process_group\n"
        "from .own import _mine\n"
        "def f(x: Tensor):\n"
        "    importlib.import_module('torch._inductor.exc')\n"
        "    importlib.import_module('kernels._own')\n"
        "    return torch._fused_adamw_(dist._world.y), x._mine, torch.ops.a.b, torch.__version__\n"
    ) == {
        "torch._dynamo.config",
        "torch._ops.OpOverload",
        "torch._C",
        "torch.distributed.distributed_c10d._resolve_process_group",
        "torch._inductor.exc",
        "torch._fused_adamw_",
        "torch.distributed._world",
        "torch.distributed._world.y",
    }


@pytest.mark.parametrize("package", ["kernels", "gptbert"])
def test_only_one_file_uses_private_names(package):
    found = {
        str(file.relative_to(ROOT)): names
        for file in (ROOT / package).rglob("*.py")
        if (names := private_names(file.read_text(encoding="utf-8")))
    }
    found.pop("kernels/torch_private.py", None)
    assert not found


@pytest.mark.skipif(platform.machine() not in {"x86_64", "AMD64"}, reason="other CPUs name their vectors otherwise")
def test_cpp_is_compiled_for_the_vectors_that_pytorch_uses():
    width = torch_private.load_cpp(
        """
        extern "C" int vector_bytes() {
        #if defined(__AVX512F__)
            return 64;
        #elif defined(__AVX2__)
            return 32;
        #else
            return 16;
        #endif
        }
        """,
        [],
    ).vector_bytes()
    assert width >= {"AVX512": 64, "AVX2": 32}.get(torch.backends.cpu.get_cpu_capability(), 16)


@pytest.mark.parametrize("name", ["CppCodeCache", "CppCodeCache.load_async"])
def test_without_the_code_cache_there_are_no_kernels_in_cpp(monkeypatch, name):
    assert cpp.unavailable() is None
    monkeypatch.delattr(f"torch._inductor.codecache.{name}")
    assert "loads no C++" in cpp.unavailable()


def test_a_code_cache_that_takes_no_flags_is_none(monkeypatch):
    monkeypatch.setattr("torch._inductor.codecache.CppCodeCache.load_async", lambda main_code, device_type: None)
    assert not torch_private.loads_cpp()


def test_without_the_assertion_labels_on_a_cpu_are_checked(monkeypatch):
    monkeypatch.delattr(torch, "_assert_async")
    hidden, weight = torch.randn(3, 4), torch.randn(5, 4)
    masked_cross_entropy(hidden, weight, torch.tensor([0, 4, -100]), backend="torch")
    with pytest.raises(RuntimeError, match="labels: one is neither ignore_index -100 nor in 0 … 4"):
        masked_cross_entropy(hidden, weight, torch.tensor([0, 5, -100]), backend="torch")


def test_without_fused_adamw_lamb_is_its_reference(monkeypatch):
    taken = []
    for module in (eager, reference):
        own = module.lamb_step
        monkeypatch.setattr(module, "lamb_step", lambda *a, own=own, m=module, **k: taken.append(m) or own(*a, **k))

    def step():
        generator = torch.Generator().manual_seed(3)
        params, grads, exp_avgs = ([torch.randn(7, 5, generator=generator)] for _ in range(3))
        moments = exp_avgs, [exp_avgs[0].square()], [torch.zeros(())]
        lamb_step(params, grads, *moments, lr=0.1, weight_decay=0.1, max_grad_norm=1.0, beta1=0.9, beta2=0.98, eps=1e-6)
        return params[0]

    fused = step()
    monkeypatch.delattr(torch, "_fused_adamw_")
    torch.testing.assert_close(step(), fused)
    assert taken == [eager, reference]


def test_without_names_of_groups_one_line_says_so(monkeypatch):
    monkeypatch.delattr("torch.distributed.distributed_c10d._resolve_process_group")
    with pytest.raises(RuntimeError, match="does not find a process group by its name"):
        torch_private.process_group("0")


def test_errors_and_settings_that_do_not_exist_are_left_out(monkeypatch):
    autograd = torch_private._module("torch._functorch.config")
    with autograd.patch(activation_memory_budget=1.0):
        torch_private.configure_autograd_compiler(no_such_setting=1, activation_memory_budget=0.5)
        assert autograd.activation_memory_budget == 0.5
        with torch_private.restored_autograd_compiler("no_such_setting", "activation_memory_budget"):
            torch_private.configure_autograd_compiler(activation_memory_budget=0.25)
        assert autograd.activation_memory_budget == 0.5
    assert not hasattr(autograd, "no_such_setting")
    assert torch_private.inductor_options({"no_such_setting": 1, "size_asserts": False}) == {"size_asserts": False}
    every = torch_private.compile_errors()
    monkeypatch.delattr("torch._inductor.exc.InvalidCxxCompiler")
    left = torch_private.compile_errors()
    assert (len(every), len(left)) == (3, 2)
    assert set(left) < set(every)
