"""Machine code on a CPU: it computes what it should, and what is planted in it is found."""

import re
import subprocess
import sys
from importlib.metadata import version

import numpy as np
import pytest
import torch

from kernels import inspect as kernels_inspect
from kernels.attention_context import reference
from kernels.configuration import Configuration
from kernels.machine_code import machine
from kernels.machine_code.emulation import emulate
from kernels.machine_code.findings import Findings, UnknownInstructionError
from kernels.machine_code.listing import Listing
from kernels.machine_code.machine import Machine
from kernels.machine_code.running import RunningProducts
from kernels.machine_code.tensors import GlobalMemory
from kernels.machine_code.wavefronts import wavefronts
from kernels.numerics import random_bf16
from tests.runs import ROOT

pytest.importorskip("triton")
SHAPES = ("d=64 T=128 dropout", "d=32 T=50", "d=32 T=16")  # whole tiles; a part of one; one with products of warps
KERNELS = ("forward_kernel", "queries_kernel", "keys_kernel")
FIRST = (0, 0, 0)
LANES = np.arange(32)
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
    return shapes[SHAPES[0]][0]


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
def test_machine_code_computes_attention_and_its_gradients(file, shape):
    """The first head of four rows: whole ones, a causal one of many documents and one with padding."""
    kernels, inputs, grad, of_projection = torch.load(file, weights_only=False)[0][shape]
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
        built = kernels_inspect.Build("tile", "sm_90", registers=32, tile=tile)
        assert kernels_inspect._broken_bars(configuration, kernels_inspect.TARGETS["sm_90"], built, "") == problems


@pytest.mark.parametrize(
    ("addresses", "size", "active", "expected"),
    [
        (4 * LANES, 4, LANES >= 0, 1),  # each its own bank
        (0 * LANES, 4, LANES >= 0, 1),  # one word for all
        (128 * LANES, 4, LANES >= 0, 32),  # one bank
        (128 * LANES, 4, LANES < 5, 5),
        (8 * LANES, 4, LANES >= 0, 2),
        (2 * LANES, 2, LANES >= 0, 1),  # two lanes a word
        (130 * LANES, 2, LANES >= 0, 2),
        (8 * LANES, 8, LANES >= 0, 2),
        (16 * LANES, 16, LANES >= 0, 4),
        (16 * LANES, 16, LANES < 8, 1),
        (128 * LANES, 16, LANES >= 0, 32),
        (16 * (LANES ^ LANES // 8), 16, LANES >= 0, 4),
        (4 * LANES, 4, LANES < 0, 0),
    ],
)
def test_wavefronts(addresses, size, active, expected):
    assert wavefronts(addresses, size, active) == expected
    twice = np.concatenate([addresses, addresses + 4096]), size, np.concatenate([active, active])
    assert wavefronts(*twice) == 2 * expected


def machine_of(*lines, tensors=None, num_threads=32, shared_bytes=4096):
    """A machine that is about to execute these instructions, and an end."""
    text = "\n".join(f"/*{16 * index:04x}*/ {line} ;" for index, line in enumerate([*lines, "EXIT"]))
    findings = Findings()
    memory = GlobalMemory(tensors or {}, num_threads, findings)
    parameters = b"".join(pointer.to_bytes(8, "little") for pointer in memory.pointers.values())
    return Machine(Listing.parse(text), num_threads, shared_bytes, parameters, (1, 1, 1), FIRST, memory, findings)


def execute(*lines, **registers):
    """Registers R8 and R9 as one number, and P1, P2, of each lane."""
    made = machine_of(*lines)
    for name, values in registers.items():
        made.registers[int(name[1:])], made.undefined[int(name[1:])] = values, 0
    made.run()
    assert made.findings.lines() == []
    low, high = made.registers[8].astype(object), made.registers[9].astype(object)
    return low + (high << 32), made.predicates[1], made.predicates[2]


NUMBERS = np.random.default_rng(5).integers(0, 1 << 32, (4, 32), dtype=np.uint32)
NUMBERS[:, :4] = [[0, 0, 0xFFFFFFFF, 0x80000000], [0, 1, 1, 0x80000000], [0, 0, 0, 0], [0, 0xFFFFFFFF, 1, 5]]
A, B, C, E = NUMBERS.astype(object)
SA, SB = NUMBERS[:2].view(np.int32).astype(object)
M32, M64 = (1 << 32) - 1, (1 << 64) - 1
OPERATIONS = {
    "carries of a sum of 64 bits": (
        ["IADD3 R8, P1, R0, R1, RZ", "IADD3.X R9, R2, R3, RZ, P1, !PT"],
        (A + B) + ((C + E) << 32) & M64,
    ),
    "differences": (["IADD3 R8, P1, R0, -R1, RZ", "IADD3.X R9, R2, ~R3, RZ, P1, !PT"], (A - B) + ((C - E) << 32) & M64),
    "scaled addresses": (
        ["LEA R8, P1, R0, R1, 0x3", "LEA.HI.X R9, R0, R2, RZ, 0x3, P1"],
        (A << 3) + B + (C << 32) & M64,
    ),
    "scaled signed addresses": (
        ["LEA R8, P1, R0, R1, 0x2", "LEA.HI.X.SX32 R9, R0, R2, 0x2, P1"],
        (SA << 2) + B + (C << 32) & M64,
    ),
    "differences to scaled addresses": (
        ["LEA R8, P1, -R0, R1, 0x2", "SHF.L.U64.HI R9, R0, 0x2, R2", "IMAD.X R9, R3, 0x1, ~R9, P1"],
        B + (E << 32) - (A + (C << 32) << 2) & M64,
    ),
    "wide products": (["IMAD.MOV.U32 R8, RZ, RZ, RZ", "IMAD.WIDE.U32 R8, R0, R1, R2"], A * B + C + (E << 32) & M64),
    "wide signed products": (["IMAD.WIDE R8, R0, R1, R2"], SA * SB + C + (E << 32) & M64),
    "high products": (
        ["IMAD.HI.U32 R8, R0, R1, R2", "IMAD.HI R9, R0, R1, RZ"],
        ((A * B >> 32) + C & M32) + ((SA * SB >> 32 & M32) << 32),
    ),
    "shifts": (["SHF.L.U32 R8, R0, 0x7, RZ", "SHF.L.U64.HI R9, R0, 0x7, R1"], (A + (B << 32)) << 7 & M64),
    "right shifts": (["SHF.R.S64 R8, R0, 0x1f, R1", "SHF.R.S32.HI R9, RZ, 0x1f, R1"], A + (SB << 32) >> 31 & M64),
    "logic": (
        ["LOP3.LUT R8, R0, R1, R2, 0x96, !PT", "LOP3.LUT R9, R0, R1, R2, 0xe8, !PT"],
        (A ^ B ^ C) + ((A & B | A & C | B & C) << 32),
    ),
    "bytes": (
        ["PRMT R8, R0, 0x5410, R1", "PRMT R9, R0, 0x7632, R1"],
        (A & 0xFFFF) + ((B & 0xFFFF) << 16) + (A >> 16 << 32) + (B >> 16 << 48),
    ),
    "the least": (
        ["VIMNMX R8, R0, R1, PT", "VIMNMX.U32 R9, R0, R1, !PT"],
        (np.minimum(SA, SB) & M32) + (np.maximum(A, B) << 32),
    ),
    "extensions": (
        ["SGXT R8, R0, 0xe", "SGXT.U32 R9, R0, 0xe"],
        ((SA << 18 & M32 ^ 1 << 31) - (1 << 31) >> 18 & M32) + ((A & 0x3FFF) << 32),
    ),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_integers(name):
    lines, expected = OPERATIONS[name]
    got, *_ = execute(*lines, R0=A, R1=B, R2=C, R3=E)
    assert (got == expected).all()


@pytest.mark.parametrize("is_signed", [False, True])
@pytest.mark.parametrize(("name", "compare"), [("GE", np.greater_equal), ("LT", np.less), ("NE", np.not_equal)])
def test_comparisons_of_pairs(name, compare, is_signed):
    left, right = A + ((SB if is_signed else B) << 32), C + (SB.repeat(1) << 32 if is_signed else B << 32)
    high = "" if is_signed else ".U32"
    _, holds, opposite = execute(
        f"ISETP.{name}.U32.AND P0, PT, R0, R2, PT",
        f"ISETP.{name}{high}.AND.EX P1, P2, R1, R3, PT, P0",
        R0=A,
        R1=B,
        R2=C,
        R3=B,
    )
    assert (holds == compare(left, right)).all()
    assert (opposite == ~holds).all()


def test_floats_are_rounded_as_pytorch_rounds_them():
    left, right = (random_bf16(32, seed)[:, 0].float() for seed in (1, 2))
    got, *_ = execute(
        "FFMA R9, R0, R1, -R0",
        "F2FP.BF16.F32.PACK_AB R8, R9, R1",
        R0=left.numpy().view(np.uint32),
        R1=right.numpy().view(np.uint32),
    )
    exact = (left.double() * right.double() - left.double()).float()
    packed = torch.stack([right, exact], 1).bfloat16().view(torch.int32)[:, 0]
    assert (got >> 32 == exact.numpy().view(np.uint32)).all()
    assert (got & M32 == packed.numpy().view(np.uint32)).all()


def test_undefined_bits_matter_only_where_they_are_used():
    """Bits that are masked or shifted away are none; one that is left decides nothing and is stored nowhere."""
    used = ["LDC.64 R2, c[0x0][0x210]", "LOP3.LUT R0, R5, 0xf0, RZ, 0xc0, !PT"]
    for lines, found in (
        (["LOP3.LUT R1, R0, 0xf, RZ, 0xc0, !PT"], False),
        (["IMAD.SHL.U32 R1, R0, 0x1000000, RZ", "PRMT R1, R1, 0x4440, R1"], False),
        (["IADD3 R1, R0, 0x1, RZ"], True),
        (["LOP3.LUT R1, R0, 0x1f, RZ, 0xc0, !PT"], True),
        (["SEL R1, R0, RZ, !PT"], False),
        (["ISETP.NE.AND P0, PT, R0, RZ, PT", "SEL R1, RZ, 0x1, P0"], True),
        (["STS [RZ+0x400], R0", "LDS R1, [RZ+0x400]"], True),
        (["LDS R1, [RZ+0x400]"], True),
    ):
        made = machine_of(*used, *lines, "STG.E desc[UR4][R2.64], R1", tensors={"x": torch.zeros(1)})
        made.run()
        assert {"uninitialised register" in line for line in made.findings.lines()} == ({True} if found else set()), (
            lines
        )
    made = machine_of("ISETP.NE.AND P0, PT, R0, RZ, PT", "@P0 BRA 0x0")
    made.run()
    assert made.findings.lines()[0].startswith("depends on an uninitialised register")


def test_warps_that_go_different_ways_meet_again():
    """Each lane of the first warp counts to its number, the second warp does not; then all reach a barrier."""
    lines = [
        "S2R R0, SR_TID.X", "ISETP.GE.AND P0, PT, R0, 0x20, PT", "MOV R8, RZ", "@P0 BRA 0x70",
        "VIADD R8, R8, 0x1", "ISETP.LT.AND P1, PT, R8, R0, PT", "@P1 BRA 0x40", "BAR.SYNC.DEFER_BLOCKING 0x0",
    ]  # fmt: skip
    made = machine_of(*lines, num_threads=64)
    made.run()
    assert made.findings.lines() == []
    assert made.registers[8].tolist() == [max(1, lane) for lane in range(32)] + [0] * 32
    assert made.issued.tolist() == [2, 2, 2, 2, 31, 31, 31, 2, 2]


def test_lanes_of_a_warp_that_go_different_ways_meet_again():
    """Odd lanes take what even ones take twice; all of them then add one."""
    made = machine_of(
        "S2R R0, SR_TID.X", "LOP3.LUT R1, R0, 0x1, RZ, 0xc0, !PT", "ISETP.NE.AND P0, PT, R1, RZ, PT", "MOV R8, RZ",
        "BSSY B0, 0x80", "@P0 BRA 0x70", "VIADD R8, R8, 0x5", "VIADD R8, R8, 0x5", "BSYNC B0", "VIADD R8, R8, 0x1",
    )  # fmt: skip
    made.run()
    assert made.findings.lines() == []
    assert made.registers[8].tolist() == [11, 6] * 16
    assert made.issued.tolist() == [1] * 11, "both ways are one instruction from where they meet"


@pytest.mark.parametrize(("line", "is_wrong"), [("@P0 EXIT", False), ("@P0 BRA 0x40", True)])
def test_a_barrier_is_for_all_threads_that_have_not_ended(line, is_wrong):
    lines = ["S2R R0, SR_TID.X", "ISETP.GE.AND P0, PT, R0, 0x20, PT", line, "BAR.SYNC.DEFER_BLOCKING 0x0"]
    made = machine_of(*lines, num_threads=64)
    made.run()
    assert [found.partition(":")[0] for found in made.findings.lines()] == (
        ["a barrier that not all threads reach"] if is_wrong else []
    )


def test_copies_are_waited_for():
    lines = [
        "LDC.64 R2, c[0x0][0x210]", "LDGSTS.E.BYPASS.128 [RZ+0x400], desc[UR4][R2.64]", "LDGDEPBAR",
        "LDGSTS.E.BYPASS.128 [RZ+0x500], desc[UR4][R2.64]", "LDGDEPBAR", "DEPBAR.LE SB0, 0x1",
    ]  # fmt: skip
    for place, kind in (("0x400", None), ("0x500", "shared memory that a copy still writes")):
        made = machine_of(*lines, f"LDS.128 R8, [RZ+{place}]", tensors={"x": torch.arange(4)})
        made.run()
        assert [line.partition(":")[0] for line in made.findings.lines()] == ([] if kind is None else [kind])
        assert made.registers[8:12, 0].tolist() == [0, 0, 1, 0]


def test_products_run_until_they_are_waited_for():
    running = RunningProducts()
    running.start(range(8), range(20, 24), np.arange(64))
    running.close()
    running.start(range(8, 16), range(0), np.arange(64, 128))
    running.close()
    running.wait(1)
    assert (running.results, running.operands) == (set(range(8, 16)), set())
    assert running.reads(np.array([[70]]))
    assert not running.reads(np.array([[3]]))
    running.wait(0)
    assert not running.results
    assert not running.reads(np.array([[70]]))


def test_loops_are_the_innermost():
    lines = ["NOP", "NOP", "@P0 BRA 0x10", "@P1 BRA 0x0", "@P2 BRA 0x60", "NOP", "EXIT", "BRA 0x70"]
    text = "\n".join(f"/*{16 * index:04x}*/ {line} ;" for index, line in enumerate(lines))
    assert Listing.parse(text).loops() == [range(1, 3)]


def test_unknown_instructions_are_said():
    for line in ("FROB R0, R1", "IMAD.FROB R0, R1, R2, R3", "CS2R R0, SR_CLOCKLO", "MOV R0, c[0x3][0x20]"):
        with pytest.raises(UnknownInstructionError, match=re.escape(line.split()[0])):
            machine_of(line).run()
