"""Machine code on a CPU: it computes what it should, and what is planted in it is found."""

import re
import subprocess
import sys
from importlib.metadata import version

import pytest
import torch

from kernels import inspect as kernels_inspect
from kernels.attention_context import reference
from kernels.configuration import Configuration
from kernels.machine_code import machine
from kernels.machine_code.emulation import emulate
from kernels.machine_code.listing import Listing
from tests.runs import ROOT

pytest.importorskip("triton")
SHAPES = ("d=64 T=128 dropout", "d=32 T=50", "d=32 T=16")  # whole tiles; a part of one; one with products of warps
KERNELS = ("forward_kernel", "queries_kernel", "keys_kernel")
FIRST = (0, 0, 0)
NEEDS_TRITON = pytest.mark.skipif(not version("triton").startswith("3.7."), reason="other assemblers: other code")


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("machine_code") / "compiled.pt"
    command = [sys.executable, "-m", "tests.machine_code", path, *SHAPES]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr[-3000:]
    return path


@pytest.fixture
def compiled(file):
    """Fresh tensors for each test: the machine writes them."""
    shapes, _ = torch.load(file, weights_only=False)
    return shapes["sm_90", SHAPES[0]][0]


def run(kernel, listing=None, blocks=(FIRST,)):
    listing = Listing.parse(listing or kernel.listing)
    return emulate(listing, kernel.launch, kernel.types, kernel.shared_bytes, blocks)


def kinds(emulation):
    return {line.partition(":")[0] for line in emulation.findings}


def close(got, expected):
    """Within a few of bf16's roundings, for numbers of which each is a sum of many."""
    return (got.float() - expected).abs().max() < 0.01 * expected.abs().max()


@NEEDS_TRITON
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_machine_code_computes_attention_and_its_gradients(file, target, shape):
    """The first head of four rows: whole ones, a causal one of many documents and one with padding."""
    kernels, inputs, grad, of_projection = torch.load(file, weights_only=False)[0][target, shape]
    head = kernels["forward_kernel"].launch.arguments["d"]
    for name in KERNELS:
        tiles, second, third = kernels[name].launch.grid
        rows = second if name == "forward_kernel" else 1
        assert (rows, third) in {(4, inputs.num_heads), (1, 1)}
        result = run(kernels[name], blocks=[(tile, row, 0) for tile in range(tiles) for row in range(rows)])
        assert result.findings == []
        assert {counts.tiles for counts in result.counts} <= {1, 2}
    parts = kernels["queries_kernel"].launch.arguments["of_position_ptr"]
    projection, position = inputs.projection.float().requires_grad_(), inputs.position.float().requires_grad_()
    query, key, value, _ = projection.chunk(4, -1)
    expected = reference.fused_attention(
        query, key, *position.chunk(2, -1), value, inputs.buckets, inputs.document_ids, inputs.is_causal, inputs.seed,
        inputs.dropout_prob, scale=inputs.scale, num_heads=inputs.num_heads,
    )  # fmt: skip
    expected = expected.movedim(0, -2).flatten(-2)
    expected.backward(grad.float())
    output = kernels["forward_kernel"].launch.arguments["output_ptr"]
    assert close(output[..., :head], expected[..., :head].detach())
    for quarter in range(3):
        columns = slice(quarter * output.shape[-1], quarter * output.shape[-1] + head)
        assert close(of_projection[..., columns], projection.grad[..., columns])
    assert not of_projection.chunk(4, -1)[3].any()
    for half in range(2):
        columns = slice(half * output.shape[-1], half * output.shape[-1] + head)
        assert close(parts.sum(0)[:, columns], position.grad[:, columns])


def replaced(listing, pattern, replacement, which=0):
    """The listing with one instruction changed, the `which`-th that matches."""
    found = list(re.finditer(pattern, listing))[which]
    return listing[: found.start()] + found.expand(replacement) + listing[found.end() :]


PLANTED = [
    (r"(STS\.128 \[R\d+\+UR\d+\+0x)\w+\]", r"\g<1>9f00]", "out of shared memory"),
    (r"(STS\.128 \[R\d+\+UR\d+\+0x)\w+\]", r"\g<1>1004]", "misaligned"),
    (r"BAR\.SYNC\.DEFER_BLOCKING 0x0", "NOP", "race"),
    (r"FENCE\.VIEW\.ASYNC\.S", "NOP", "shared memory without a fence since it was written"),
    (r"WARPGROUP\.DEPBAR\.LE gsb0, 0x0", "NOP", "reads a result of a running product"),
    (r"(HGMMA\S+ R\d+, gdesc\[UR)\d+\]", r"\g<1>4]", "descriptor"),
    (r"UMOV UR\d+, 0x40000040", "NOP", "uninitialised descriptor"),
    (r"S2R R\d+, SR_TID\.X", "NOP", "uninitialised register"),
    (r"(?<=[^@\w])(?<!P\d )(STG\.E\.128 desc\[UR\d+\]\[)R\d+\.64", r"\g<1>R20.64", "out of global memory"),
]


@NEEDS_TRITON
@pytest.mark.parametrize(("pattern", "replacement", "kind"), PLANTED)
def test_planted_faults_are_found(compiled, pattern, replacement, kind):
    kernel = compiled["forward_kernel"]
    assert kind in kinds(run(kernel, replaced(kernel.listing, pattern, replacement)))


@NEEDS_TRITON
def test_barriers_that_are_left_out_are_races(compiled):
    """Nearly all: where a warp loads only what it has stored itself, the compiler's barrier is not needed."""
    kernel = compiled["forward_kernel"]
    found = [
        "race" in kinds(run(kernel, replaced(kernel.listing, r"BAR\.SYNC\.DEFER_BLOCKING 0x0", "NOP", which)))
        for which in range(8)
    ]
    assert sum(found) >= 6


@NEEDS_TRITON
@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("argument", ["key_ptr", "table_ptr", "document_ids_ptr", "lse_ptr"])
def test_a_tensor_that_is_too_short_is_found(compiled, name, argument):
    kernel = compiled[name]
    tensor = kernel.launch.arguments[argument]
    kernel.launch.arguments[argument] = tensor[:-1] if argument == "table_ptr" else tensor[:, :-1]
    if argument == "lse_ptr":
        kernel.launch.arguments[argument] = tensor[..., :-1]
    assert kinds(run(kernel, blocks=[FIRST, (1, 0, 0)])) == {"out of a tensor"}


@NEEDS_TRITON
def test_a_program_that_does_not_end_is_stopped(compiled, monkeypatch):
    kernel = compiled["forward_kernel"]
    monkeypatch.setattr(machine, "_MOST_STEPS", 4000)
    listing = Listing.parse(kernel.listing)
    address = listing.instructions[listing.loops()[0][-1]].address
    endless = replaced(kernel.listing, rf"(/\*{address:04x}\*/\s+)@!?U?P\d", r"\g<1>")
    assert kinds(run(kernel, endless)) >= {"no end"}


@NEEDS_TRITON
def test_costs_of_a_tile(compiled):
    for name in KERNELS:
        (counts,) = run(compiled[name]).counts
        assert counts.tiles == 2
        assert 1000 < counts.instructions_in_loop < counts.instructions < 3000
        assert 900 < counts.wavefronts_in_loop < counts.wavefronts < 2500
        assert 400 < counts.lines < 1200


@NEEDS_TRITON
def test_what_cannot_be_emulated_is_a_note_and_another_launch_a_finding(file):
    _, found = torch.load(file, weights_only=False)
    assert {name: measured.counts for name, measured in found.items()} == dict.fromkeys(found)
    assert re.search(r"unknown instruction .* S2X R\d+, SR_TID\.X", found["unknown"].note)
    assert found["missing"].note.endswith("no cuobjdump")
    assert not found["unknown"].findings
    assert not found["missing"].findings
    assert found["other"].findings == ["not emulated: launched with another SPAN"]


def test_more_than_allowed_is_a_problem():
    configuration = Configuration("tile", None, {}, streams=False, most_instructions=100, most_wavefronts=50)
    for instructions, wavefronts_a_tile, problems in (
        (100, 50, []),
        (100.7, 50, ["takes 101 instructions a tile, of 100 allowed"]),
        (100, 52, ["takes 52 wavefronts a tile, of 50 allowed"]),
    ):
        tile = {"instructions": instructions, "wavefronts": wavefronts_a_tile}
        for target, expected in (("sm_90", problems), ("sm_80", [])):
            built = kernels_inspect.Build("tile", target, registers=32, tile=tile)
            assert kernels_inspect._broken_bars(configuration, kernels_inspect.TARGETS[target], built, "") == expected
