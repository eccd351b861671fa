"""The command `gptbert`, or `python -m gptbert`: its first argument names what to do, the others are that command's."""

import importlib
import sys
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path

from gptbert import __version__
from gptbert.io.imports import explained, uncollected

with explained():
    from gptbert.command_line import printing

_COMMANDS = {
    "split": ("tokenize_scripts.split_corpus", "split documents into train, validation and test"),
    "train-tokenizer": ("tokenize_scripts.train_tokenizer", "learn a tokenizer"),
    "tokenize": ("tokenize_scripts.tokenize_corpus", "turn documents into a token file"),
    "train": ("gptbert.train", "train a model"),
    "evaluate": ("gptbert.evaluate", "loss, perplexity and accuracy on data"),
    "score": ("gptbert.score", "minimal pairs, causal and masked"),
    "babylm": ("gptbert.babylm", "all zero-shot tasks of BabyLM's evaluation"),
    "generate": ("gptbert.generate", "continue a text"),
    "fill-mask": ("gptbert.fill_mask", "fill <mask> in texts"),
    "report": ("gptbert.report", "a run as one HTML page"),
    "export": ("gptbert.export", "write a folder that transformers loads"),
    "import": ("gptbert.import_hf", "make a checkpoint of a published model"),
    "unshard": ("gptbert.unshard", "ordinary weights from an FSDP checkpoint"),
    "check": ("kernels.check", "compare kernels with their references on this machine"),
    "bench": ("benchmarks.bench_train_step", "time training steps on this machine; in a checkout only"),
}  # by name: a module with `main`, and what it does
_CHECKOUT = Path(__file__).resolve().parents[1]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command. The exit status is its own; 2 if there is none of that name.

    Args:
        arguments: the name of a command, and its own; by default those of the command line.
    """
    name, *rest = arguments or sys.argv[1:] or ["--help"]
    if name in {"-h", "--help"}:
        width = max(map(len, _COMMANDS)) + 2
        lines = (f"  {command:{width}}{what}" for command, (_, what) in _COMMANDS.items())
        with printing():
            print("usage: gptbert COMMAND …, or gptbert --version\n", *lines, sep="\n")
            print("\ngptbert COMMAND --help says more.")
        return
    if name == "--version":
        with printing():
            print(f"gptbert {__version__}")
        return
    if name not in _COMMANDS:
        meant = get_close_matches(name, _COMMANDS, n=1)
        way_on = f"did you mean {meant[0]}?" if meant else "gptbert --help lists them"
        print(f"error: gptbert has no command {name!r}; {way_on}", file=sys.stderr)
        sys.exit(2)
    module = _COMMANDS[name][0]
    if module.startswith("benchmarks."):  # which is no part of the package
        if not (_CHECKOUT / "benchmarks").is_dir():
            print(f"error: gptbert {name}: the benchmarks are in a checkout of gptbert only", file=sys.stderr)
            sys.exit(1)
        sys.path.append(str(_CHECKOUT))
    sys.argv = [f"gptbert {name}", *rest]
    with uncollected(), explained():
        command = importlib.import_module(module)
    command.main()


if __name__ == "__main__":
    main()
