"""What each instruction of machine code does on a CPU, and what the machine says of wrong ones."""

import re

import numpy as np
import pytest
import torch

from kernels.machine_code.emulation import INSTRUCTION_SETS  # noqa: F401 - registers what instructions do
from kernels.machine_code.findings import Findings, UnknownInstructionError
from kernels.machine_code.listing import Listing
from kernels.machine_code.machine import Machine
from kernels.machine_code.running import RunningProducts
from kernels.machine_code.tensors import GlobalMemory
from kernels.machine_code.wavefronts import lines as cache_lines
from kernels.machine_code.wavefronts import wavefronts
from kernels.numerics import random_bf16

LANES = np.arange(32)


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


@pytest.mark.parametrize(
    ("addresses", "size", "active", "expected"),
    [
        (4 * LANES, 4, LANES >= 0, 1),
        (4 * LANES + 64, 4, LANES >= 0, 2),
        (0 * LANES, 2, LANES >= 0, 1),
        (128 * LANES, 2, LANES >= 0, 32),
        (128 * LANES, 2, LANES < 5, 5),
        (8 * LANES, 8, LANES >= 0, 2),
        (16 * LANES, 16, LANES >= 0, 4),
        (64 * LANES, 16, LANES >= 0, 16),
        (4 * LANES, 4, LANES < 0, 0),
    ],
)
def test_lines_of_the_cache(addresses, size, active, expected):
    assert cache_lines(addresses, size, active) == expected


def machine_of(*lines, tensors=None, num_threads=32, shared_bytes=4096, target="sm_90"):
    """A machine that is about to execute these instructions, and an end."""
    instructions = [f"/*{16 * index:04x}*/ {line} ;" for index, line in enumerate([*lines, "EXIT"])]
    text = "\n".join([f"code for {target}", *instructions])
    findings = Findings()
    memory = GlobalMemory(tensors or {}, num_threads, findings)
    parameters = b"".join(pointer.to_bytes(8, "little") for pointer in memory.pointers.values())
    return Machine(Listing.parse(text), num_threads, shared_bytes, parameters, (1, 1, 1), (0, 0, 0), memory, findings)


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
        ((A * B + C + (E << 32) & M64) >> 32) + ((SA * SB >> 32 & M32) << 32),
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
    "the least, on sm_80": (
        ["IMNMX R8, R0, R1, PT", "IMNMX.U32 R9, R0, R1, !PT"],
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


@pytest.mark.parametrize("line", ["HADD2.BF16_V2 R8, R0, R1", "HFMA2.BF16_V2 R8, R0, 1, 1, R1"])
def test_sums_of_bf16_are_rounded_as_pytorch_rounds_them(line):
    left, right = random_bf16(32, 2), random_bf16(33, 2)[1:]
    registers = {f"R{row}": each.view(torch.int32)[:, 0].numpy() for row, each in enumerate((left, right))}
    got, *_ = execute(line, "MOV R9, RZ", **registers)
    assert (got == (left + right).view(torch.int32)[:, 0].numpy().view(np.uint32)).all()


def test_integers_become_floats():
    got, *_ = execute("I2F R8, R0", "I2F.U32 R9, R0", R0=A)
    signed, unsigned = (each.astype(np.float32).view(np.uint32).astype(object) for each in (SA, A))
    assert (got == signed + (unsigned << 32)).all()


def test_shared_memory_and_arguments_of_sm_80():
    """Both begin earlier than on sm_90; addresses are scaled; a loop is left by a call that nothing returns from."""
    lines = [
        "LDC.64 R2, c[0x0][0x160]", "S2R R0, SR_TID.X", "STS [R0.X4+0x80], R0", "CALL.REL.NOINC 0x50", "BRA 0x20",
        "LDS.64 R4, [R0.X8]", "LDG.E R8, desc[UR4][R2.64]",
    ]  # fmt: skip
    made = machine_of(*lines, tensors={"x": torch.arange(4)}, shared_bytes=256, target="sm_80")
    made.shared.content[:128] = made.shared.undefined[:128] = 0
    made.run()
    assert made.findings.lines() == []
    assert made.shared.content[128:].view(np.uint32).tolist() == LANES.tolist()
    assert made.registers[4].tolist() == [0] * 16 + LANES[::2].tolist()
    assert made.registers[5].tolist() == [0] * 16 + LANES[1::2].tolist()


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


@pytest.mark.parametrize(("line", "is_wrong"), [("@P0 EXIT", False), ("@P0 BRA 0x50", True)])
def test_a_barrier_is_for_all_threads_that_have_not_ended(line, is_wrong):
    """The second warp ends, or goes to another barrier."""
    barrier = "BAR.SYNC.DEFER_BLOCKING 0x0"
    lines = ["S2R R0, SR_TID.X", "ISETP.GE.AND P0, PT, R0, 0x20, PT", line, barrier, "BRA 0x60", barrier]
    made = machine_of(*lines, num_threads=64)
    made.run()
    assert {found.partition(":")[0] for found in made.findings.lines()} == (
        {"waits for threads that do not come"} if is_wrong else set()
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
    for line in ("FROB R0, R1", "IMAD.FROB R0, R1, R2, R3", "CS2R R0, SR_CLOCKLO", "MOV R0, c[0x3][0x20]", "RET R2",
                 "HFMA2.BF16_V2 R0, R1, 2, 1, R3"):  # fmt: skip
        with pytest.raises(UnknownInstructionError, match=re.escape(line.split()[0])):
            machine_of(line).run()
