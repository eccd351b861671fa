"""Ahead-of-time builds: the kernels meet their limits on every target, and planted kernels must violate them.

Without a cache, all configurations for all targets take many minutes, so `python -m kernels.inspect` builds those; here
are the common ones for sm_90 and the widest of them for the other targets.
"""

import json
import os
import re
import subprocess
import sys
import textwrap
from importlib.metadata import version
from pathlib import Path

import pytest

import kernels.inspect as kernels_inspect
from kernels.configuration import TRITON_OPERATIONS, Configuration

ROOT = Path(__file__).parents[1]
NVIDIA = [target for target in kernels_inspect.TARGETS if target.startswith("sm_")]

SLOWER = 1.03 if version("triton").startswith("3.6.") else 1.3  # how much of a bar others than Triton 3.7 may take
COMMON = (
    r"attention_context/.* d=64 T=(128|512) dropout$|cross_entropy/(sum|multiply|scale|rows bf16 V=(16384\b|65536$))|"
    r"cross_entropy/rows fp\d\d V=16384$|lamb/(clip|norm [^(]*|moments [^(]*(stochastic|fp32 moments))$|"
    r"lamb/update [^(]*(averages, bf16 copies|moments|moments, fp32 copies)$|"
    r"span_mask/.*i64 T=(256|4096) spans to 3( |$)|"
    r"depth_mix/.*(D=768|\d bf16$|sums)|gated_norm/.* bf16 D=(2560|768|40)$|normalize/(add|.* D=(768|40)\b)|dropout/"
)
WIDEST = (
    r"attention.* d=64 T=128 dropout$|cross_entropy/rows bf16 V=(16384|32768)$|"
    r"lamb/(clip|norm bf16.*unal|moments bf16.*unal.*unal.*stochastic|update bf16.*unal.*averages, bf16)|"
    r"span_mask/.*i64 T=(512|4096) spans to 3$|depth_mix/.* bf16 D=768 dropout$|depth_mix/.* [67] bf16$|"
    r"gated_norm/.* bf16 D=(2560|384)$|normalize/(add (rows|parts)|.* bf16 D=768 dropout)$|dropout/.* bf16"
)

# Kernels that violate the limits, and one that does not.
PLANTED = """
    import triton
    import triton.language as tl

    from kernels.configuration import Configuration

    ANY = {"any": float("inf")}


    @triton.jit
    def copy_kernel(source, target, length, BLOCK: tl.constexpr):
        lanes = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        tl.store(target + lanes, tl.load(source + lanes, mask=lanes < length), mask=lanes < length)


    @triton.jit
    def row_kernel(source, target, BLOCK: tl.constexpr):
        row = tl.load(source + tl.arange(0, BLOCK))
        total = tl.sum(row.to(tl.float32), axis=0)
        for step in range(3):
            total += tl.sum(tl.exp(row.to(tl.float32) - total), axis=0)
        tl.store(target, total)


    @triton.jit
    def product_kernel(left, right, target, SIZE: tl.constexpr):
        tile = tl.arange(0, SIZE)[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
        tl.store(target + tile, tl.dot(tl.load(left + tile), tl.load(right + tile)))


    def configurations():
        types = {"source": "*fp32", "target": "*fp32", "length": "i32"}
        pointers = frozenset({"source", "target"})
        row = {"source": "*fp32", "target": "*fp32"}
        products = {"left": "*fp16", "right": "*fp16", "target": "*fp32"}
        wide, row_block = {"BLOCK": 4096}, {"BLOCK": 32768}
        return [
            Configuration("good", copy_kernel, types, wide, aligned=pointers | {"length"}),
            Configuration("unaligned", copy_kernel, types, wide),
            Configuration("unaligned but no stream", copy_kernel, types, wide, streams=False),
            Configuration("narrow store", copy_kernel, types, wide, aligned=pointers - {"target"} | {"length"}),
            Configuration("spills", row_kernel, row, row_block, aligned=pointers),
            Configuration("spills and may", row_kernel, row, row_block, aligned=pointers, most_spilled=ANY),
            Configuration("capped", row_kernel, row, {"BLOCK": 8192}, aligned=pointers, max_registers=32),
            Configuration("crowded", row_kernel, row, {"BLOCK": 131072}, 32, 128, aligned=pointers, most_spilled=ANY),
            Configuration("product", product_kernel, products, {"SIZE": 64}, aligned=frozenset(products)),
            Configuration("forgotten", copy_kernel, {"source": "*fp32", "target": "*fp32"}, wide),
            Configuration("misspelt", copy_kernel, types, wide, aligned=frozenset({"sorce"})),
            Configuration("impossible", copy_kernel, types, {"BLOCK": 1000}),
            Configuration("a short row", copy_kernel, types, {"BLOCK": 128}, aligned=pointers | {"length"}, words=32),
        ]
"""


def run(*command, cwd=ROOT, **environment):
    """Runs Python without TRITON_INTERPRET, which would make the kernels interpreted."""
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, *command], cwd=cwd, env=inherited | environment, capture_output=True, text=True, check=False
    )


@pytest.fixture(scope="module")
def inspected():
    """Builds of the repository's kernels, and the two processes that made them."""
    others = [target for target in kernels_inspect.TARGETS if target != "sm_90"]
    commands = (["--match", COMMON, "--target", "sm_90"], ["--match", WIDEST, "--target", *others])
    done = [run("-m", "kernels.inspect", "--json", *command) for command in commands]
    return [build for process in done for build in json.loads(process.stdout)["builds"]], done


def test_no_kernel_breaks_a_bar(inspected):
    """With the Triton of constraints.txt; others may spill a few bytes, or take longer (docs/library-faults.md)."""
    builds, processes = inspected
    problems = {problem for build in builds for problem in build["problems"]}
    if version("triton").startswith("3.7."):
        assert [(process.returncode, process.stderr) for process in processes] == [(0, "")] * 2
        assert not problems
    assert {problem for problem in problems if not _is_tolerable(problem)} == set()


def _is_tolerable(problem):
    if re.fullmatch(r"spills [1-5]?\d bytes a thread, of \d allowed", problem):
        return True
    found = re.fullmatch(r"takes (\d+) [\w ]+ a tile, of (\d+) allowed", problem)
    return found is not None and int(found[1]) < SLOWER * int(found[2])


def test_every_operation_is_built_for_every_target(inspected):
    builds, _ = inspected
    built = {(build["configuration"].split("/")[0], build["target"]) for build in builds if build["registers"]}
    every = {(op, target) for op in TRITON_OPERATIONS for target in kernels_inspect.TARGETS}
    assert built == every - {("attention_context", "gfx942")}
    names = [(build["configuration"], build["target"]) for build in builds]
    assert len(set(names)) == len(names)


def test_the_main_case_streams_in_wide_words_without_spills(inspected):
    """Independent of the limits: the main case has wide loads and stores and no spills, on every target."""
    builds, _ = inspected
    name = "masked_cross_entropy/rows bf16 V=16384"
    found = [build for build in builds if build["configuration"] == name]
    assert len(found) == len(kernels_inspect.TARGETS)
    for build in found:
        assert build["spill_bytes"] == 0
        assert 16 <= build["registers"] <= 128
        assert max(map(int, build["loads"])) >= 128 <= max(map(int, build["stores"]))
        assert not build["tensor_cores"]


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """Builds of the planted kernels, by name and target."""
    folder = tmp_path_factory.mktemp("planted")
    (folder / "planted.py").write_text(textwrap.dedent(PLANTED))
    # a file, since every worker imports it
    (folder / "inspect_planted.py").write_text(
        "import dataclasses, json\nfrom kernels.inspect import inspect_modules\n"
        "if __name__ == '__main__':\n"
        "    print(json.dumps([dataclasses.asdict(build) for build in inspect_modules(['planted'])]))\n"
    )
    path = os.pathsep.join([str(folder), str(ROOT)])
    done = run(str(folder / "inspect_planted.py"), cwd=folder, PYTHONPATH=path)
    assert done.returncode == 0, done.stderr
    return {(build["configuration"], build["target"]): build for build in json.loads(done.stdout)}


def test_what_is_cached_measures_the_same(tmp_path):
    """Cold, from the cache, and from a cache filled by a launch, which does not keep ptxas's output."""
    (tmp_path / "planted.py").write_text(textwrap.dedent(PLANTED))
    script = (
        "import pathlib, planted\nfrom kernels.inspect import build\n"
        "capped = planted.configurations()[6]\nbuilds = [build(capped, 'sm_90'), build(capped, 'sm_90')]\n"
        "for log in pathlib.Path('cache').glob('*/ptxas.log'): log.unlink()\n"
        "builds.append(build(capped, 'sm_90'))\n"
        "assert builds[0] == builds[1] == builds[2], builds\nprint(capped.name, builds[0].spill_bytes)"
    )
    done = run("-c", script, cwd=tmp_path, PYTHONPATH=str(ROOT), TRITON_CACHE_DIR=str(tmp_path / "cache"))
    assert done.returncode == 0, done.stderr
    name, spilled = done.stdout.split()
    assert name == "capped"
    assert int(spilled) > 0


@pytest.mark.parametrize("target", kernels_inspect.TARGETS)
def test_good_kernels_pass(planted, target):
    for name in ("good", "unaligned but no stream", "a short row", "spills and may", "product"):
        assert planted[name, target]["problems"] == [], name
    good = planted["good", target]
    assert {*good["loads"]} == {*good["stores"]} == {"128"}


@pytest.mark.parametrize("target", kernels_inspect.TARGETS)
def test_narrow_streams_are_rejected(planted, target):
    problems = planted["unaligned", target]["problems"]
    assert problems == ["the widest load has 32 bits, not 128", "the widest store has 32 bits, not 128"]
    assert planted["narrow store", target]["problems"] == ["the widest store has 32 bits, not 128"]


@pytest.mark.parametrize("target", NVIDIA)
def test_spills_are_rejected_on_nvidia(planted, target):
    spills = planted["spills", target]
    assert spills["spill_bytes"] > 0
    assert spills["problems"] == [f"spills {spills['spill_bytes']} bytes a thread, of 0 allowed"]
    assert planted["spills and may", target]["spill_bytes"] == spills["spill_bytes"]
    assert planted["capped", target]["registers"] <= 32
    assert planted["capped", target]["spill_bytes"] > 0


@pytest.mark.parametrize("target", NVIDIA)
def test_programs_that_do_not_fit_are_rejected(planted, target):
    crowded = planted["crowded", target]
    assert crowded["registers"] > 64
    (problem,) = crowded["problems"]
    assert problem == f"cannot start: takes {-(-crowded['registers'] // 8) * 8 * 1024} registers of 65536"


@pytest.mark.parametrize(
    ("target", "most"),
    [
        ("sm_80", 166912),
        ("sm_89", 101376),
        ("sm_90", 232448),
        ("sm_100", 232448),
        ("sm_120", 101376),
        ("gfx942", 65536),
    ],
)
def test_shared_memory_that_no_program_can_have_is_rejected(target, most):
    configuration = Configuration("tile", None, {}, streams=False)
    for size, problems in (
        (most, []),
        (most + 1, [f"cannot start: takes {most + 1} bytes of shared memory of {most}"]),
    ):
        built = kernels_inspect.Build("tile", target, registers=128, shared_bytes=size)
        assert kernels_inspect._broken_bars(configuration, kernels_inspect.TARGETS[target], built, "") == problems


def test_registers_and_spills_on_amd():
    assembly = "    .sgpr_spill_count: 2\n    .vgpr_count:     128\n    .vgpr_spill_count: 70\n"
    measured = kernels_inspect._measure_amd(assembly)
    assert (measured["registers"], measured["spill_bytes"]) == (128, 4 * (70 + 2))


@pytest.mark.parametrize("target", kernels_inspect.TARGETS)
def test_tensor_cores_and_shared_memory(planted, target):
    assert planted["product", target]["tensor_cores"]
    assert planted["product", target]["shared_bytes"] >= 64 * 64 * 2
    assert not planted["good", target]["tensor_cores"]
    assert planted["good", target]["shared_bytes"] == 0


@pytest.mark.parametrize("target", kernels_inspect.TARGETS)
def test_what_does_not_compile_is_a_problem_of_its_own(planted, target):
    for name, reason in (("forgotten", "disagree about length"), ("misspelt", "disagree about sorce")):
        (problem,) = planted[name, target]["problems"]
        assert problem.startswith("does not compile:")
        assert problem.endswith(reason)
    (problem,) = planted["impossible", target]["problems"]
    assert problem.startswith("does not compile:")


def test_a_broken_bar_is_a_line_and_the_exit_status(monkeypatch, capsys):
    build = kernels_inspect.Build("lamb/norm", "sm_90", 40, loads={128: 2, 32: 1}, problems=["spills 8 bytes a thread"])
    good = kernels_inspect.Build("lamb/norm", "sm_80", 41, loads={128: 2, 32: 1})
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # main removes it, and it must be restored for other tests
    for argument in ([], ["--json"]):
        for builds, status in (([good], 0), ([good, build], 1)):
            monkeypatch.setattr(sys, "argv", ["inspect", *argument])
            monkeypatch.setattr(kernels_inspect, "inspect_modules", lambda *_, builds=builds: builds)
            with pytest.raises(SystemExit) as error:
                kernels_inspect.main()
            captured = capsys.readouterr()
            assert error.value.code == status
            assert captured.err.splitlines() == ["lamb/norm on sm_90: spills 8 bytes a thread"] * status
            rows = json.loads(captured.out)["builds"] if argument else captured.out.splitlines()[1:]
            assert len(rows) == len(builds)


@pytest.mark.parametrize(
    ("ptx", "kind", "widths"),
    [
        ("@%p1 ld.global.v4.b32 { %r1, %r2, %r3, %r4 }, [ %rd1 + 0 ];", "ld", [128]),
        ("ld.global.L1::evict_first.L2::cache_hint.v8.b32 {%r1}, [%rd1];", "ld", [256]),
        ("ld.volatile.global.b16 {%r1}, [%rd1]; ld.shared.v4.b32 {%r1}, [%r2];", "ld", [16]),
        ("ld.global.nc.v4.u64 {%r1}, [%rd1]; ld.param.b64 %rd1, [x];", "ld", [256]),
        ("cp.async.cg.shared.global [ %r1 + 0 ], [ %rd1 + 0 ], 0x10, %r2;", "ld", [128]),
        ("cp.async.ca.shared.global.L2::128B [%r1], [%rd1], 8; cp.async.commit_group;", "ld", [64]),
        ("st.global.v2.b32 [ %rd3 + 0 ], { %r5, %r6 }; ld.global.b64 %rd1, [%rd2];", "st", [64]),
    ],
)
def test_widths_of_loads_and_stores_are_read_from_ptx(ptx, kind, widths):
    assert list(kernels_inspect._ptx_widths(kind, ptx)) == widths


def test_widths_of_loads_and_stores_are_read_from_amd_assembly():
    assembly = "global_load_dwordx4 v[0:3]\nbuffer_load_ushort v1\nglobal_load_dword v1\nbuffer_store_dwordx2 v[0:1]"
    assert list(kernels_inspect._amd_widths("load", assembly)) == [128, 16, 32]
    assert list(kernels_inspect._amd_widths("store", assembly)) == [64]


def test_what_is_missing_is_one_clear_line(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(kernels_inspect.ToolchainError, match="interpreted kernels cannot be built"):
        kernels_inspect.check_toolchain(["sm_90"])
    monkeypatch.delenv("TRITON_INTERPRET")
    nvidia = pytest.importorskip("triton.backends.nvidia.compiler")

    def missing(_):
        raise RuntimeError("Cannot find ptxas")

    monkeypatch.setattr(nvidia, "get_ptxas", missing)
    nvidia.get_ptxas_version.cache_clear()
    with pytest.raises(kernels_inspect.ToolchainError, match=r"sm_90: ptxas does not run .Cannot find ptxas"):
        kernels_inspect.check_toolchain(["sm_90"])
    monkeypatch.setattr(kernels_inspect.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(kernels_inspect.ToolchainError, match="not installed"):
        kernels_inspect.check_toolchain(["sm_90"])


def test_the_file_does_not_hide_the_standard_library():
    done = run("-c", "import kernels.inspect, torch, inspect; print(inspect.__file__)")
    assert Path(done.stdout.strip()).parent == Path(os.__file__).parent


def test_the_command_works_where_kernels_would_be_interpreted():
    done = run("-m", "kernels.inspect", "--op", "lamb", "--match", "clip", "--target", "sm_90", TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stderr
    _, row = done.stdout.splitlines()
    assert row.startswith("lamb/clip")


def test_a_match_that_finds_nothing_is_no_success():
    done = run("-m", "kernels.inspect", "--op", "lamb", "--match", "no such kernel")
    assert (done.returncode, done.stdout) == (2, "")
    assert "'no such kernel'" in done.stderr
