"""The parts, most valuable first: a run cut short has the first of them."""

from typing import Any

from benchmarks.gpu.cases import CASES
from benchmarks.gpu.settings import Part

TRAINER = ("tyro", "safetensors", "tokenizers", "tqdm")  # imports of gptbert.trainer besides PyTorch
GROUPS = ("machine", "check", "steps", "operations", "resume", "soak", "tests")
COMPILING_OPERATIONS = "compiling operations"

Stage = list[Part]


def stages() -> list[Stage]:
    """All parts, in stages. The parts of a stage run in parallel; a stage starts when the previous one has ended.

    First compilation, on all cores, into shared caches; then training steps, one case at a time on the GPU; then, in
    parallel again, tests whose outcome does not depend on speed; last, alone, what can be had in a second run
    (`--only operations`).
    """
    return [
        [Part("machine", "machine", "benchmarks.gpu.hardware:measure", 40)],
        compilations(),
        *([_steps(name)] for name in CASES),
        [
            _resume("resume, compiled", is_compiled=True),
            _resume("resume, not compiled", is_compiled=False),
            Part("soak", "soak", "benchmarks.gpu.soak:measure", 150, needs=TRAINER),
            Part("tests", "tests", "benchmarks.gpu.lane:measure", 180, needs=("pytest", "hypothesis")),
        ],
        [Part("check before a run", "check", "benchmarks.gpu.check:before_a_run", 120, needs=TRAINER)],
        [_operations("operations", "measure", 120, compiled_by=COMPILING_OPERATIONS)],
    ]


def compilations() -> Stage:
    """The parts that fill the caches, and the kernel check. Cases that share compiled code are one part."""
    sharing: dict[tuple[str, int], list[str]] = {}
    for case in CASES.values():
        sharing.setdefault((case.model, case.seq_length), []).append(case.name)
    return [
        Part("check", "check", "benchmarks.gpu.check:measure", 200, needs=("tyro",)),
        *(
            Part(
                f"compiling {model} T={seq_length}", "steps", "benchmarks.gpu.steps:compile_first", 150,
                options={"names": names}, needs=TRAINER,
            )
            for (model, seq_length), names in sharing.items()
        ),
        _operations(COMPILING_OPERATIONS, "compile_first", 80),
    ]  # fmt: skip


def chosen(only: list[str]) -> list[Stage]:
    """The stages with only the parts of these groups; all if no names are given."""
    kept = [[part for part in stage if not only or part.group in only] for stage in stages()]
    return [stage for stage in kept if stage]


def _steps(name: str) -> Part:
    return Part(f"steps {name}", "steps", "benchmarks.gpu.steps:measure", 75, options={"name": name}, needs=TRAINER)


def _operations(name: str, function: str, seconds: float, **options: Any) -> Part:
    needs = (*TRAINER, "pytest", "pytest_benchmark")
    return Part(name, "operations", f"benchmarks.gpu.operations:{function}", seconds, options, needs)


def _resume(name: str, *, is_compiled: bool) -> Part:
    options = {"is_compiled": is_compiled}
    return Part(name, "resume", "benchmarks.gpu.resume:measure", 170, options=options, needs=TRAINER)
