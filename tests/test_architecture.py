"""Arrows go one way, and the repository's own names stand in nobody's way."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def imports(file):
    """Absolute names of the modules that a file imports anywhere, also inside functions."""
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
        ("gptbert/checkpoint/checkpoint.py", ["gptbert.trainer"]),
        ("gptbert/monitoring/metrics.py", ["gptbert.trainer"]),
        ("gptbert/monitoring/records.py", ["gptbert"]),
        ("gptbert/monitoring/trackers.py", ["gptbert.trainer"]),
        ("gptbert/report.py", ["gptbert.trainer", "gptbert.model", "torch"]),
        ("gptbert/data/packing.py", ["gptbert.trainer"]),
    ],
)
def test_arrows_go_one_way(pattern, forbidden):
    files = list(ROOT.glob(pattern))
    assert files
    for file in files:
        assert not [name for name in imports(file) if reaches(name, forbidden)], file


def test_only_the_demo_of_gptbert_uses_the_scripts():
    """The demo makes its data as a user would; nothing else in the package knows of the scripts."""
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
