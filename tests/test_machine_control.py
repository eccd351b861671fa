"""Where the threads of a machine go, and its numbers of other sizes than fp32 and bf16."""

import numpy as np
import pytest
import torch

from tests.test_machine_instructions import LANES, execute, machine_of

M32 = (1 << 32) - 1


def registers_of(**values):
    """Pairs of registers, by the first one's name, for 64 bits of each lane."""
    words = {}
    for name, numbers in values.items():
        row, bits = int(name[1:]), np.asarray(numbers).view(np.uint64)
        words |= {f"R{row}": bits.astype(np.uint32), f"R{row + 1}": (bits >> np.uint64(32)).astype(np.uint32)}
    return words


def test_a_function_returns_to_each_who_called_it():
    """Odd lanes call it from another place than even ones; lanes that do not call wait for them."""
    made = machine_of(
        "S2R R0, SR_TID.X", "LOP3.LUT R1, R0, 0x1, RZ, 0xc0, !PT", "ISETP.NE.AND P0, PT, R1, RZ, PT",
        "ISETP.LT.AND P1, PT, R0, 0x4, PT", "MOV R8, RZ", "MOV R3, RZ", "BSSY B0, 0xe0", "@P1 BRA 0xe0", "@P0 BRA 0xc0",
        "MOV R2, 0xb0", "CALL.REL.NOINC 0x120", "BRA 0xe0",  # 0xb0
        "MOV R2, 0xe0", "CALL.REL.NOINC 0x120",
        "BSYNC B0", "SHFL.IDX PT, R9, R8, RZ, 0x1f", "VIADD R8, R8, 0x1", "EXIT",
        "IADD3 R8, R2, 0x100, RZ", "RET.REL.NODEC R2 0x0",  # 0x120
    )  # fmt: skip
    made.run()
    assert made.findings.lines() == []
    assert made.registers[8].tolist() == [1] * 4 + [0x1B1, 0x1E1] * 14
    assert not made.registers[9].any()
    assert made.issued[14:18].tolist() == [2, 1, 1, 1], "those that do not call, then all others; then all together"


def test_lanes_that_have_left_are_not_waited_for():
    """The first eight lanes break out, the next eight end."""
    made = machine_of(
        "S2R R0, SR_TID.X", "ISETP.LT.AND P0, PT, R0, 0x8, PT", "ISETP.LT.AND P1, PT, R0, 0x10, PT", "BSSY B1, 0x80",
        "@P0 BREAK B1", "@P0 BRA 0x90", "PLOP3.LUT P2, PT, P1, PT, PT, 0x80, 0x0", "@P2 EXIT", "BSYNC B1",
        "VIADD R8, R0, 0x1",
    )  # fmt: skip
    made.run()
    assert made.findings.lines() == []
    assert made.registers[8, :8].tolist() == list(range(1, 9))
    assert made.registers[8, 16:].tolist() == list(range(17, 33))


def test_an_end_may_have_two_conditions():
    made = machine_of(
        "S2R R0, SR_TID.X", "ISETP.LT.AND P0, PT, R0, 0x10, PT", "ISETP.LT.AND P1, PT, R0, 0x8, PT",
        "MOV R8, RZ", "@P0 EXIT !P1", "MOV R8, 0x7",
    )  # fmt: skip
    made.run()
    assert made.registers[8].tolist() == [7] * 8 + [0] * 8 + [7] * 16


@pytest.mark.parametrize(
    ("way", "where", "others"),
    [
        ("UP PT, R8, R0, 0x3, RZ", LANES - 3, LANES[:3]),
        ("DOWN PT, R8, R0, 0x3, 0x1f", LANES + 3, LANES[-3:]),
        ("BFLY PT, R8, R0, 0x5, 0x1f", LANES ^ 5, []),
        ("IDX PT, R8, R0, 0x5, 0x1f", 0 * LANES + 5, []),
    ],
)
def test_lanes_read_others(way, where, others):
    """Those without such a lane keep their own, and the predicate says so."""
    expected = np.where(np.isin(LANES, others), LANES, where)
    got, there, _ = execute(f"SHFL.{way.replace('PT', 'P1', 1)}", "MOV R9, RZ", R0=LANES.astype(np.uint32))
    assert (got == expected).all()
    assert (there == ~np.isin(LANES, others)).all()


def test_a_lane_that_takes_no_part_is_not_read():
    made = machine_of("S2R R0, SR_TID.X", "ISETP.LT.AND P0, PT, R0, 0x8, PT", "@P0 SHFL.BFLY PT, R8, R0, 0x8, 0x1f")
    made.run()
    assert [line.partition(":")[0] for line in made.findings.lines()] == ["a lane that takes no part"]


def test_a_warp_has_one_sum_and_one_vote():
    numbers = (LANES * 7 - 90).astype(np.int32)
    got, any_of, _ = execute(
        "REDUX.SUM.S32 UR4, R0", "MOV R8, UR4", "POPC R9, R0", "ISETP.EQ.AND P3, PT, R0, 0x1, PT", "VOTEU.ANY UP1, P3",
        "PLOP3.LUT P1, PT, PT, PT, UP1, 0x80, 0x0",
        R0=numbers.view(np.uint32),
    )  # fmt: skip
    ones = np.array([(int(number) & M32).bit_count() for number in numbers], object)
    assert (got == (int(numbers.sum()) & M32) + (ones << 32)).all()
    assert any_of.all() == (numbers == 1).any()


def test_doubles():
    """Rounded once, also a product and a sum together."""
    generator = np.random.default_rng(3)
    a, b, c = (generator.standard_normal(32) * 10.0 ** generator.integers(-9, 9, 32) for _ in range(3))
    for line, expected in (
        ("DADD R8, R0, -R2", a - b),
        ("DMUL R8, R0, |R2|", a * abs(b)),
        ("DFMA R8, R0, R2, 6.75539944105574400000e+15", a * b + 6755399441055744.0),
        ("DFMA R8, -R0, R2, R4", (c.astype(np.longdouble) - a.astype(np.longdouble) * b).astype(np.float64)),
    ):
        got, *_ = execute(line, **registers_of(R0=a, R2=b, R4=c))
        np.testing.assert_allclose(got.astype(np.uint64).view(np.float64), expected, rtol=4e-16)


def test_doubles_are_compared_and_narrowed():
    numbers = np.array([0.5, -3.25, np.nan, np.inf] * 8)
    _, less, other = execute("DSETP.LT.AND P1, P2, R0, 1, PT", **registers_of(R0=numbers))
    assert (less == (numbers < 1)).all()
    assert (other == ~less).all()
    _, none, _ = execute("DSETP.NAN.AND P1, PT, R0, R0, PT", **registers_of(R0=numbers))
    assert (none == np.isnan(numbers)).all()
    got, *_ = execute("F2F.F32.F64 R8, R0", "MOV R9, RZ", **registers_of(R0=numbers))
    assert (got == numbers.astype(np.float32).view(np.uint32)).all()
    single = np.full(32, 1.1, np.float32)
    got, *_ = execute("F2F.F64.F32 R8, R0", R0=single.view(np.uint32))
    assert (got == single.astype(np.float64).view(np.uint64)).all()


@pytest.mark.parametrize(("name", "function"), [("RCP", lambda x: 1 / x), ("RSQ", lambda x: x**-0.5)])
def test_functions_of_doubles_begin_with_the_high_word(name, function):
    """A start for Newton's steps: about 20 bits."""
    numbers = np.linspace(0.01, 50, 32)
    got, *_ = execute("MOV R8, RZ", f"MUFU.{name}64H R9, R1", **registers_of(R0=numbers))
    np.testing.assert_allclose(got.astype(np.uint64).view(np.float64), function(numbers), rtol=2e-6)


def test_halves():
    numbers = torch.linspace(-7, 9, 64).view(32, 2)
    packed = numbers.half().view(torch.int32)[:, 0].numpy().view(np.uint32)
    low, high = (numbers[:, index].numpy().view(np.uint32) for index in range(2))
    got, *_ = execute("F2FP.F16.F32.PACK_AB R8, R1, R0", "HADD2.F32 R9, -RZ, R8.H1_H1", R0=low, R1=high)
    assert (got & M32 == packed).all()
    assert (got >> 32 == numbers[:, 1].half().float().numpy().view(np.uint32)).all()
    got, *_ = execute("HFMA2.MMA R8, -RZ, RZ, 1.875, -0.5", "HADD2.F32 R9, -RZ, -R8.H0_H0")
    assert (got == 0x3F80B800 + (int(np.float32(0.5).view(np.uint32)) << 32)).all()


def test_integers_of_floats_and_back():
    """Rounded up and cut off, as a division of integers begins."""
    whole = np.array([1, 3, (1 << 24) + 1, M32] * 8, np.uint64)
    got, *_ = execute("I2F.U32.RP R8, R0", "MOV R9, RZ", R0=whole.astype(np.uint32))
    up = got.astype(np.uint32).view(np.float32).astype(np.float64)
    assert (up >= whole).all()
    assert up[:4].tolist() == [1, 3, (1 << 24) + 2, 1 << 32]
    wide = np.array([5, (1 << 63) + 1] * 16, np.uint64)
    got, *_ = execute("I2F.U64.RP R8, R0", "MOV R9, RZ", **registers_of(R0=wide))
    assert got.astype(np.uint32).view(np.float32)[:2].tolist() == [5, float(2**63 + 2**40)]
    numbers = np.array([0.9, 7.5, 2.0**40, -3, np.nan, 2.0**70, 2.0**31, 1] * 4, np.float32)
    got, *_ = execute("F2I.FTZ.U32.TRUNC.NTZ R8, R0", "MOV R9, RZ", R0=numbers.view(np.uint32))
    assert got[:8].tolist() == [0, 7, M32, 0, 0, M32, 1 << 31, 1]
    got, *_ = execute("F2I.U64.TRUNC R8, R0", R0=numbers.view(np.uint32))
    assert got[:8].tolist() == [0, 7, 1 << 40, 0, 0, (1 << 64) - 1, 1 << 31, 1]


def test_the_lesser_of_a_number_and_none_is_either():
    numbers = np.array([1.0, np.nan] * 16, np.float32)
    got, *_ = execute("FMNMX R8, R0, 2, PT", "FMNMX.NAN R9, R0, 2, PT", R0=numbers.view(np.uint32))
    low, high = (words.astype(np.uint32).view(np.float32) for words in (got & M32, got >> 32))
    assert low[:2].tolist() == [1, 2]
    assert high[0] == 1
    assert np.isnan(high[1])


def test_bits_that_are_shifted_away_are_not_used():
    """As of a register whose lower half was loaded."""
    for line, found in (("SHF.L.U32 R4, R5, 0x10, RZ", False), ("SHF.R.U32.HI R4, RZ, 0x8, R5", True)):
        made = machine_of(
            "LDC.64 R2, c[0x0][0x210]", "PRMT R5, RZ, 0x7610, R5", line, "STG.E desc[UR4][R2.64], R4",
            tensors={"x": torch.zeros(1)},
        )  # fmt: skip
        made.run()
        assert bool(made.findings.lines()) == found


def test_addresses_in_tensors():
    """A table holds those of two other tensors; one that no tensor has is out of memory."""
    first, second = torch.arange(8), torch.arange(8) * 10
    for address, kind in ((second.data_ptr() + 16, None), (8, "out of global memory")):
        made = machine_of(
            "S2R R0, SR_LANEID", "LDC.64 R2, c[0x0][0x210]", "ISETP.EQ.AND P0, PT, R0, RZ, PT",
            "LDG.E.64 R4, desc[UR4][R2.64]", "@!P0 LDG.E.64 R4, desc[UR4][R2.64+0x8]", "LDG.E R8, desc[UR4][R4.64]",
            tensors={"table": torch.tensor([first.data_ptr() + 8, address])},
        )  # fmt: skip
        made.run()
        assert [line.partition(":")[0] for line in made.findings.lines()] == ([] if kind is None else [kind])
        assert made.registers[8, :2].tolist() == [1, 0 if kind else 20]
