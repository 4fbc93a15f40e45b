"""Reading machine code: loops, not merely backward branches."""

from fastops.inspection import sass

HEADER = "\t\tFunction : kernel\n"


def listing(*lines):
    rows = (f"        /*{16 * index:04x}*/                   {line} ;   /* 0x0 */" for index, line in enumerate(lines))
    return HEADER + "\n".join(rows) + "\n"


def loops_of(*lines):
    (function,) = sass.parse(listing(*lines))
    return sass.loops(function)


def test_a_simple_loop():
    (loop,) = loops_of("MOV R1, R2", "HMMA.16816.F32 R0, R1, R2, R3", "IADD3 R1, R1, 1, RZ", "@P0 BRA 0x10", "EXIT")
    assert loop.length == 3
    assert loop.tensor_operations == 1
    assert loop.count("IADD3", "BRA") == 2


def test_a_wait_moved_behind_the_end_is_part_of_the_loop_and_makes_no_other():
    lines = (
        "MOV R0, RZ",
        "HGMMA.64x64x16.F32 R24, gdesc[UR8], R24",  # 0x10: the loop
        "SYNCS.PHASECHK.TRANS64.TRYWAIT P1, [R2], R3",
        "@!P1 BRA 0x80",
        "HGMMA.64x64x16.F32 R24, gdesc[UR8], R24",  # 0x40
        "@P0 BRA 0x10",
        "HGMMA.64x64x16.F32 R24, gdesc[UR8], R24",  # after the loop
        "EXIT",
        "SYNCS.PHASECHK.TRANS64.TRYWAIT P1, [R2], R3",  # 0x80: spins, then goes back into the loop
        "@!P1 BRA 0x80",
        "BRA 0x40",
        "BRA 0xb0",
    )
    (loop,) = loops_of(*lines)
    assert loop.tensor_operations == 2
    assert loop.length == 5 + 3


def test_the_inner_of_two_nested_loops_counts():
    lines = (
        "MOV R0, RZ",
        "HMMA.16816.F32 R0, R1, R2, R3",  # 0x10: the outer loop peels one
        "HMMA.16816.F32 R0, R1, R2, R3",
        "HMMA.16816.F32 R0, R1, R2, R3",  # 0x30: the inner loop
        "@P0 BRA 0x30",
        "@P1 BRA 0x10",
        "EXIT",
    )
    (loop,) = loops_of(*lines)
    assert loop.length == 2


def test_main_loop_prefers_tensor_cores_then_brevity():
    lines = (
        *("HMMA R0, R1, R2, R3", "@P0 BRA 0x0"),
        *("HMMA R0, R1, R2, R3", "HMMA R0, R1, R2, R3", "NOP", "@P0 BRA 0x20"),
        *("HMMA R0, R1, R2, R3", "HMMA R0, R1, R2, R3", "@P0 BRA 0x60"),
        *("FADD R0, R1, R2",) * 9,
        *("@P0 BRA 0x90", "EXIT"),
    )
    found = loops_of(*lines)
    assert [loop.tensor_operations for loop in found] == [1, 2, 2]
    assert sass.main_loop(found).length == 3


def test_without_tensor_cores_the_longest_loop():
    found = loops_of("FADD R0, R1, R2", "@P0 BRA 0x0", "FADD R0, R1, R2", "NOP", "BRA.U UP0, 0x20", "EXIT", "BRA 0x60")
    assert sass.main_loop(found).length == 3
    assert sass.main_loop(loops_of("EXIT", "BRA 0x10")) is None
    assert sass.parse("") == []


def test_kinds_of_tensor_core_instructions():
    kinds = {"HMMA": "HMMA", "IMMA": "HMMA", "DMMA": "HMMA", "QMMA": "HMMA", "OMMA": "HMMA"}
    kinds |= {"HGMMA": "HGMMA", "QGMMA": "HGMMA", "IGMMA": "HGMMA", "UTCHMMA": "UTCMMA", "UTCQMMA": "UTCMMA"}
    kinds |= {"FFMA": None, "HFMA2": None, "WARPGROUP": None, "UTMALDG": None, "UTCBAR": None}
    assert {root: sass.tensor_core_kind(root) for root in kinds} == kinds


def test_reconvergence_points_end_blocks():
    lines = (
        "BSSY B0, 0x50",
        "@P0 BRA 0x30",
        "BSYNC B0",
        "FADD R0, R1, R2",  # 0x30
        "BSYNC.RECONVERGENT B0",
        "@P1 BRA 0x0",  # 0x50
        "EXIT",
    )
    (loop,) = loops_of(*lines)
    assert loop.length == 6
