"""Imports go in one direction, and the repository's module names collide with no other package."""

import ast
import importlib
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

from kernels.configuration import OPERATIONS
from kernels.depth_mix import cpp as depth_mix

ROOT = Path(__file__).parents[1]


def imports(file):
    """Absolute names of the modules that a file imports anywhere, including inside functions."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            package = file.relative_to(ROOT).with_suffix("").parts[: -node.level] if node.level else ()
            module = ".".join([*package, *([node.module] if node.module else [])])
            names |= {module} | {f"{module}.{alias.name}" for alias in node.names}
    return names


def reaches(name, forbidden):
    return any(name == target or name.startswith(f"{target}.") for target in forbidden)


def test_the_scan_sees_every_kind_of_import(tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    (tmp_path / "package").mkdir()
    file = tmp_path / "package" / "module.py"
    file.write_text(
        "import a.b as c\nfrom gptbert import trainer\ndef f():\n    from . import data\n    from .x import y\n"
    )
    assert imports(file) == {"a.b", "gptbert", "gptbert.trainer", "package", "package.data", "package.x", "package.x.y"}
    assert reaches("gptbert.trainer", ["gptbert"])
    assert not reaches("gptbertish", ["gptbert"])


@pytest.mark.parametrize(
    ("pattern", "forbidden"),
    [
        ("kernels/**/*.py", ["gptbert", "train_distributed", "tokenize_scripts", "benchmarks", "tests"]),
        ("gptbert/**/*.py", ["train_distributed", "benchmarks", "tests"]),
        ("gptbert/report.py", ["torch"]),
    ],
)
def test_arrows_go_one_way(pattern, forbidden):
    files = list(ROOT.glob(pattern))
    assert files
    for file in files:
        assert not [name for name in imports(file) if reaches(name, forbidden)], file


# The layers of gptbert/, bottom up: a file imports from its own wing and from lower layers.
FLOORS = [
    {"errors", "kernels_finder"},
    {"io"},
    {"config", "command_line", "text"},
    {"schedules", "model", "muon"},
    {"upstream", "distributed"},
    {"optim", "data"},
    {"checkpoint"},
    {"monitoring", "scoring"},
    {"training"},
    {"trainer", "huggingface"},
    {"train"},
    {"evaluate", "score", "generate", "fill_mask", "export", "import_hf", "unshard", "report"},  # python -m gptbert.X
    {"babylm", "demo", "__main__"},
]


def modules():
    """Each module of gptbert/, with the modules of gptbert/ that it imports."""
    files = {".".join(file.relative_to(ROOT).with_suffix("").parts): file for file in ROOT.glob("gptbert/**/*.py")}
    files = {name.removesuffix(".__init__"): file for name, file in files.items() if name != "gptbert.__init__"}
    return {name: {other for other in imports(file) if other in files} - {name} for name, file in files.items()}


def wing(module):
    """A module's wing of gptbert/, or its own name if it is outside the wings."""
    return module.split(".")[1]


def test_wings_import_what_is_below_them():
    floor = {name: number for number, names in enumerate(FLOORS) for name in names}
    assert {wing(module) for module in modules()} == floor.keys()
    upwards = [
        (module, other)
        for module, others in modules().items()
        for other in others
        if wing(module) != wing(other) and floor[wing(module)] <= floor[wing(other)]
    ]
    assert upwards == []


def test_no_import_leads_back_and_none_is_far_from_the_ground():
    graph, chains = modules(), {}

    def chain(module, above=()):
        assert module not in above, " -> ".join([*above, module])
        if module not in chains:
            below = [chain(other, (*above, module)) for other in graph[module]]
            chains[module] = [module, *max(below, key=len, default=[])]
        return chains[module]

    longest = max(map(chain, graph), key=len)
    # A package counts if its own name is imported, such as gptbert.model for GPTBert.
    assert len(longest) <= 12, " -> ".join(longest)


def test_no_folder_has_more_files_than_a_reader_takes_in():
    folders = [file.parent for file in ROOT.glob("gptbert/**/__init__.py")]
    assert len(folders) <= 11
    for folder in folders:
        assert len(list(folder.glob("*.py"))) <= 22, folder


@pytest.mark.parametrize(
    "wing", ["io", "text", "data", "model", "distributed", "checkpoint", "monitoring", "scoring", "training"]
)
def test_a_wing_says_what_each_of_its_files_is(wing):
    folder = ROOT / "gptbert" / wing
    docstring = ast.get_docstring(ast.parse((folder / "__init__.py").read_text(encoding="utf-8")))
    named = [
        name
        for line in docstring.splitlines()
        if line.startswith("- ")
        for name in re.findall(r"`(\w+)`", line.partition(":")[0])
    ]
    assert sorted(named) == sorted(file.stem for file in folder.glob("*.py") if file.stem != "__init__")


# The files of an operation's folder; extra files of some of them; and the operation whose function has a longer name.
NEEDED = {"__init__.py", "op.py", "reference.py", "check.py", "README.md"}
BACKENDS = {"eager.py", "kernel.py", "cpp.py", "kernel.cpp"}
FURTHER = {
    "attention_context": {"backward_kernel.py", "bucket_sums.py", "fused.py", "gated.py", "tiles.py"},
    "depth_mix": {"fused.py", "gram_kernel.py"},
    "gated_norm": {"fused.py"},
    "dropout": {"fused.py"},
    "lamb": {"arguments.py", "chunk.py", "chunk_table.py", "rounding.py", "prepared.py", "shards.py"},
    "masked_cross_entropy": {"inputs.py", "sum_kernel.py"},
    "normalize": {"fused.py"},
}
FUNCTIONS = {"lamb": "lamb_step"}


TOOLS = {"machine_code"}  # folders of kernels/ that are no operations


def test_every_operation_is_in_the_list():
    assert set(OPERATIONS) | TOOLS == {file.parent.name for file in ROOT.glob("kernels/*/__init__.py")}


def test_a_tool_says_what_each_of_its_files_is_and_no_run_loads_it():
    for tool in TOOLS:
        folder = ROOT / "kernels" / tool
        docstring = ast.get_docstring(ast.parse((folder / "__init__.py").read_text(encoding="utf-8")))
        lines = [line.partition(":")[0] for line in docstring.splitlines() if line.startswith("- `")]
        named = [name for line in lines for name in re.findall(r"`(\w+)`", line)]
        assert sorted(named) == sorted(file.stem for file in folder.glob("*.py") if file.stem != "__init__")
        users = [
            file for file in ROOT.glob("[gk]*/**/*.py") if any(reaches(n, [f"kernels.{tool}"]) for n in imports(file))
        ]
        assert users
        assert {file.parent for file in users} == {folder}


@pytest.mark.parametrize("op", OPERATIONS)
def test_every_operation_has_the_same_files(op):
    files = {file.name for file in (ROOT / "kernels" / op).iterdir() if file.is_file()}
    assert files >= NEEDED
    assert files <= NEEDED | BACKENDS | FURTHER.get(op, set())
    assert ("cpp.py" in files) == ("kernel.cpp" in files)
    assert (ROOT / "tests" / f"test_{op}.py").is_file()
    assert (ROOT / "benchmarks" / f"bench_{op}.py").is_file()
    name = FUNCTIONS.get(op, op)
    for module in (f"kernels.{op}", f"kernels.{op}.reference"):
        assert inspect.isfunction(getattr(importlib.import_module(module), name))


def test_sizes_that_python_and_cpp_share_are_the_same():
    source = (ROOT / "kernels/depth_mix/kernel.cpp").read_text(encoding="utf-8")
    assert re.findall(r"constexpr int64_t PIECE = (\d+);", source) == [str(depth_mix.PIECE)]


def test_only_the_demo_of_gptbert_uses_the_scripts():
    """The demo makes its data like a user; no other module of the package may depend on the scripts."""
    users = {
        file.name
        for file in (ROOT / "gptbert").glob("*.py")
        if any(reaches(n, ["tokenize_scripts"]) for n in imports(file))
    }
    assert users <= {"demo.py"}


def python(code):
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_kernels_do_not_load_the_trainer():
    ran = python("import sys, kernels; print([name for name in sys.modules if name.split('.')[0] == 'gptbert'])")
    assert (ran.returncode, ran.stdout.strip()) == (0, "[]"), ran.stderr


def test_transformers_works_beside_our_kernels_package():
    """PyPI has a package named `kernels` too, and transformers looks for it."""
    ran = python(
        "import kernels\n"
        "from transformers import AutoConfig, BertConfig, BertModel\n"
        "from transformers.integrations import hub_kernels\n"
        "import torch\n"
        "shape = {'hidden_size': 8, 'num_hidden_layers': 1, 'num_attention_heads': 2, 'intermediate_size': 8}\n"
        "config = BertConfig(vocab_size=9, **shape)\n"
        "assert AutoConfig.for_model('bert').model_type == 'bert'\n"
        "print(BertModel(config)(torch.tensor([[1, 2, 3]])).last_hidden_state.shape, kernels.__file__)\n"
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.split(") ")[0] == "torch.Size([1, 3, 8]"
    assert str(ROOT / "kernels") in ran.stdout
