"""Make a small English corpus from Python's own documentation: `demo_corpus.py --output demo.jsonl`."""

import ast
import importlib
import inspect
import json
import re
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from gptbert.command_line import run_command
from gptbert.errors import InputError
from gptbert.io.outputs import check_outputs, staged_outputs

SKIPPED_FOLDERS = {"idlelib", "site-packages", "test", "tests", "turtledemo"}
SHORTEST_DOCUMENT = 200  # characters; shorter ones are one-liners, such as those of the generated codecs
# Modules written in C have no Python source to read; importing these has no side effects.
C_MODULES = (
    "_collections", "_datetime", "_functools", "_io", "_operator", "_socket", "_struct", "_thread", "array", "binascii",
    "builtins", "cmath", "errno", "gc", "itertools", "marshal", "math", "mmap", "posix", "select", "signal", "sys",
    "time", "unicodedata", "zlib",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """Collect the documentation that comes with Python (2.6 MB of English), one document per module or topic."""

    output: Path
    """The corpus, a JSONL file; split it with split_corpus.py."""


def demo_corpus(config: DemoConfig) -> None:
    """Write the documents; deterministic for a given Python version.

    Raises:
        InputError: this Python has no documentation, or the output cannot be written.
    """
    check_outputs([config.output], [])
    count = size = 0
    with staged_outputs(config.output) as (staged,):
        with staged.open("w", encoding="utf-8", newline="\n") as file:
            for text in documents():
                file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
                count += 1
                size += len(text.encode())
        if count == 0:
            raise InputError("this Python comes without the sources of its library; use one from python.org or uv")
    print(f"wrote {config.output}: {count:,} documents, {size:,} bytes of text (Python {sys.version.split()[0]})")


def documents() -> Iterator[str]:
    """Yield one document per `help()` topic, library module and C module, without duplicates."""
    seen: set[str] = set()
    for text in _topics():
        seen.add(text)
        yield text
    for sections in (*_source_modules(), *_c_modules()):
        pieces = []
        for heading, docstring in sections:
            text = docstring.replace("\0", r"\0")  # Python 3.14's base64 has one, which it meant to name
            if text and text not in seen:  # C versions and subclasses repeat docstrings
                seen.add(text)
                pieces.append(f"{heading}\n\n{text}")
        document = "\n\n".join(pieces)
        if len(document) >= SHORTEST_DOCUMENT:
            yield document


def _topics() -> Iterator[str]:
    """The chapters of the language reference that `help("topic")` shows."""
    try:
        from pydoc_data.topics import topics  # noqa: PLC0415  some Linux distributions omit it
    except ImportError:
        return
    yield from dict.fromkeys(text.strip() for _, text in sorted(topics.items()))  # some topics have several names


def _source_modules() -> Iterator[list[tuple[str, str]]]:
    """Headings and docstrings of each library module, parsed from source: importing some has side effects."""
    library = Path(sysconfig.get_path("stdlib"))
    for name in sorted(sys.stdlib_module_names - SKIPPED_FOLDERS):
        for file in (library / f"{name}.py", *sorted((library / name).rglob("*.py"))):
            path = file.relative_to(library)
            if file.is_file() and not SKIPPED_FOLDERS.intersection(path.parts):
                module = ".".join(path.with_suffix("").parts).removesuffix(".__init__")
                yield list(_docstrings(ast.parse(file.read_bytes()), module, ""))


def _docstrings(node: ast.AST, heading: str, prefix: str) -> Iterator[tuple[str, str]]:
    """The docstring of `node` under its heading, then those of everything defined inside it, in order."""
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        yield heading, (ast.get_docstring(node) or "").strip()
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef):
            bases = ", ".join(map(ast.unparse, child.bases))
            title = f"class {prefix}{child.name}" + (f"({bases})" if bases else "")
            yield from _docstrings(child, title, f"{prefix}{child.name}.")
        elif isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            title = f"{prefix}{child.name}({ast.unparse(child.args)})"
            yield from _docstrings(child, title, f"{prefix}{child.name}.")
        else:
            yield from _docstrings(child, heading, prefix)


def _c_modules() -> Iterator[list[tuple[str, str]]]:
    for name in C_MODULES:
        try:
            module = importlib.import_module(name)
        except ImportError:  # for example, posix on Windows
            continue
        sections = [(name, inspect.getdoc(module) or "")]
        for member, current in sorted(vars(module).items()):
            value = getattr(module, f"__{member}__", current)  # sys.excepthook and the like may have been replaced
            sections += _c_sections(member, value)
            if isinstance(value, type):
                for method, attribute in sorted(vars(value).items()):
                    sections += _c_sections(f"{member}.{method}", attribute)
        yield sections


def _c_sections(name: str, value: object) -> list[tuple[str, str]]:
    """Heading and docstring of a class, function or method; empty for data, whose `__doc__` is its type's."""
    documented = isinstance(value, type) or inspect.isroutine(value) or inspect.isdatadescriptor(value)
    # Not the slots that all types share (__eq__: "Return self==value").
    text = value.__doc__ if documented else None
    if not isinstance(text, str) or name.rpartition(".")[2].startswith("__"):
        return []
    signature = getattr(value, "__text_signature__", None) or ""
    signature = re.sub(r"\$module(, /)?(, )?", "", signature).replace("$", "")
    return [(name + signature, inspect.cleandoc(text))]


def main() -> None:
    """Entry point."""
    run_command(DemoConfig, demo_corpus)


if __name__ == "__main__":
    main()
