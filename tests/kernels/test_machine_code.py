"""The loop of a matmul is found where it runs, and its waits are read, on code written by hand."""

import pytest

from kernels import machine_code
from kernels.machine_code import Loop


def _sass(*lines):
    """nvdisasm's form: labels as they are, instructions behind their addresses."""
    return "\n".join(
        line if line.endswith(":") else f"        /*{16 * at:04x}*/                   {line} ;"
        for at, line in enumerate(lines)
    )


def _gcn(*lines):
    return "\n".join(line if line.endswith(":") else f"\t{line}" for line in lines)


HOPPER = (
    "S2R R0, SR_TID.X",
    ".L_x_3:",  # a tile
    "LDGSTS.E.BYPASS.128 [R14], desc[UR22][R20.64], P3",
    "@!P1 BRA `(.L_x_0)",  # nothing to sum
    ".L_x_2:",  # a step
    "DEPBAR.LE SB0, 0x2",
    "BAR.SYNC.DEFER_BLOCKING 0x0",
    "SYNCS.PHASECHK.TRANS64.TRYWAIT P1, [UR9+0x30000], R20",
    "@!P1 BRA `(.L_x_1)",
    ".L_x_4:",
    "HGMMA.64x256x16.F32.BF16 R24, gdesc[UR8], R24, gsb0",
    "WARPGROUP.DEPBAR.LE gsb0, 0x1",
    "SYNCS.ARRIVE.TRANS64 RZ, [UR9], R156",
    "LDGDEPBAR",
    "BRA P2, `(.L_x_2)",
    ".L_x_0:",
    "WARPGROUP.DEPBAR.LE gsb0, 0x0",
    "HGMMA.64x256x16.F32.BF16 R24, gdesc[UR8], R24",  # a last step, out of the loop
    "HGMMA.64x256x16.F32.BF16 R24, gdesc[UR8], R24",
    "DEPBAR.LE SB0, 0x0",
    "@P0 BRA `(.L_x_3)",
    "EXIT",
    ".L_x_1:",  # the wait's other tries, put out of the way
    "SYNCS.PHASECHK.TRANS64.TRYWAIT P1, [UR9+0x30000], R20",
    "@!P1 BRA `(.L_x_1)",
    "BRA `(.L_x_4)",
    ".L_x_5:",
    "BRA `(.L_x_5)",
)


def test_the_loop_is_a_step_of_k_not_the_tile_around_it_nor_a_wait_inside_it():
    code = machine_code.sass(_sass(*HOPPER))
    assert len(code) == 22
    # Nine lines in their place and the way back from the wait.
    assert machine_code.main_loop(code) == Loop(instructions=10, barriers=2, copies=2, products=1, outside=12)


def test_a_change_of_the_wait_or_of_a_barrier_shows():
    for old, new, field, value in (
        ("DEPBAR.LE SB0, 0x2", "DEPBAR.LE SB0, 0x5", "copies", 5),
        ("WARPGROUP.DEPBAR.LE gsb0, 0x1", "WARPGROUP.DEPBAR.LE gsb0, 0x0", "products", 0),
        ("BAR.SYNC.DEFER_BLOCKING 0x0", "NOP", "barriers", 1),
    ):
        loop = machine_code.main_loop(machine_code.sass(_sass(*(new if line == old else line for line in HOPPER))))
        assert getattr(loop, field) == value
    without = [line for line in HOPPER if "DEPBAR.LE" not in line]
    loop = machine_code.main_loop(machine_code.sass(_sass(*without)))
    assert (loop.copies, loop.products) == (None, None)


def test_of_two_waits_the_strictest_counts():
    waits = (
        ".L_x_0:",
        "DEPBAR.LE SB0, 0x4",
        "HMMA.16816.F32 R4, R8, R12, R4",
        "DEPBAR.LE SB0, 0x1",
        "@P0 BRA `(.L_x_0)",
    )
    assert machine_code.main_loop(machine_code.sass(_sass(*waits, "EXIT"))).copies == 1


def test_exact_float32_is_summed_by_multiply_adds_and_other_loops_are_none():
    exact = (".L_x_0:", "FFMA R0, R1, R2, R0", "FFMA R3, R1, R4, R3", "@P0 BRA `(.L_x_0)", "EXIT")
    assert machine_code.main_loop(machine_code.sass(_sass(*exact))) == Loop(3, 0, None, None, 1)
    other = (".L_x_0:", "IADD3 R0, R1, R2, R0", "@P0 BRA `(.L_x_0)", "FFMA R0, R1, R2, R0", "EXIT")
    assert machine_code.main_loop(machine_code.sass(_sass(*other))) is None


def test_a_loop_on_matrix_instructions_comes_before_a_longer_one_of_multiply_adds():
    both = (
        ".L_x_0:", "HMMA.16816.F32 R4, R8, R12, R4", "@P0 BRA `(.L_x_0)",
        ".L_x_1:", *["FFMA R0, R1, R2, R0"] * 5, "@P0 BRA `(.L_x_1)", "EXIT",
    )  # fmt: skip
    assert machine_code.main_loop(machine_code.sass(_sass(*both))) == Loop(2, 0, None, None, 7)


def test_amds_loop_counts_loads_in_flight_and_its_barriers():
    code = _gcn(
        ".LBB0_2:", "s_barrier", ".LBB0_3:", ".Ltmp1:", ".loc 1 2 3", "global_load_dword v0, v88, s[12:13]",
        "s_waitcnt vmcnt(6) lgkmcnt(0)", "s_barrier", "v_mfma_f32_32x32x8_bf16 v[0:15], v[66:67], v[8:9], v[0:15]",
        "s_waitcnt vmcnt(3)", "s_cbranch_scc1 .LBB0_3", "v_mfma_f32_32x32x8_bf16 v[0:15], v[66:67], v[8:9], v[0:15]",
        "v_mfma_f32_32x32x8_bf16 v[0:15], v[66:67], v[8:9], v[0:15]", "s_branch .LBB0_2", ".LBB0_4:", "s_endpgm",
    )  # fmt: skip
    assert machine_code.main_loop(machine_code.gcn(code)) == Loop(6, 1, 3, None, 5)


ACCOUNT = "    .vgpr_count:     {}\n    .vgpr_spill_count: {}\n"


@pytest.mark.parametrize(("registers", "spilled"), [(168, 0), (512, 3)])
def test_amds_account_is_read_and_a_spilled_register_is_four_bytes(registers, spilled):
    step = _gcn(".LBB0_0:", "v_mfma_f32_32x32x8_bf16 v[0:15], v[6:7], v[8:9], v[0:15]", "s_cbranch_vccz .LBB0_0")
    read = machine_code.amd(step + "\n" + ACCOUNT.format(registers, spilled), matmul=True)
    assert (read.registers, read.spilled, read.instructions["v_mfma"]) == (registers, 4 * spilled, 1)
    assert read.loop == Loop(2, 0, None, None, 0)
    assert machine_code.amd(step + "\n" + ACCOUNT.format(1, 0), matmul=False).loop is None
