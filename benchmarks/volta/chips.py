"""V100, T4 and A100: rates and latencies of a multiprocessor, and the source of each number."""

from __future__ import annotations

from typing import NamedTuple

PARTITIONS = 4  # of a multiprocessor, each with a scheduler and its own units
REGISTERS, REGISTER_UNIT = 65536, 256  # of a multiprocessor; they are allocated to a warp in units


class Card(NamedTuple):
    """A product and its chip."""

    name: str
    arch: int  # the compute capability, 10 * major + minor
    multiprocessors: int
    clock_hz: float
    dram_bytes_per_s: float  # as the data sheet says
    smem: int  # bytes of a multiprocessor
    max_warps: int  # resident
    tensor_cycles: int  # for which one matrix instruction keeps the tensor cores of a partition busy
    tensor_latency: int  # cycles more until its result is there

    def resident_blocks(self, threads: int, registers: int, smem: int) -> int:
        """The number of blocks of a kernel that are resident on one multiprocessor.

        Args:
            threads: per block.
            registers: per thread.
            smem: bytes of shared memory per block.
        """
        warps = threads // 32
        per_warp = -(-32 * registers // REGISTER_UNIT) * REGISTER_UNIT
        by_registers = REGISTERS // PARTITIONS // per_warp * PARTITIONS // warps
        return min(by_registers, self.max_warps // warps, self.smem // smem if smem else self.max_warps)


V100 = Card("V100", 70, 80, 1.53e9, 900e9, 96 << 10, 64, 2, 10)
T4 = Card("T4", 75, 40, 1.59e9, 320e9, 64 << 10, 32, 8, 14)
A100 = Card("A100", 80, 108, 1.41e9, 1555e9, 164 << 10, 64, 8, 18)
CARDS = {card.name: card for card in (V100, T4, A100)}

# Multiply-adds of one matrix instruction of a warp, by its shape as it stands in the machine code; that of 7.0 comes in
# four steps, each with a quarter.
MULTIPLY_ADDS = {"884": 256, "1688": 1024, "16816": 2048}
FFMA_MULTIPLY_ADDS = 32

TENSOR, FLOAT, INTEGER, SPECIAL, MEMORY, UNIFORM, CONTROL = range(7)  # the units of a partition
_UNITS = {
    TENSOR: "HMMA",
    FLOAT: "FFMA FADD FMUL IMAD HADD2 HFMA2 HMUL2",
    SPECIAL: "MUFU F2F I2F F2I FRND POPC FLO BREV",
    MEMORY: "LDS LDSM STS LDG LD STG ST SHFL LDC LDL STL MATCH R2UR S2R",
    UNIFORM: "UIADD3 UIMAD ULOP3 USHF USEL UISETP ULEA ULDC UMOV S2UR UPRMT",
    CONTROL: "BRA BSSY BSYNC BAR EXIT NOP BMOV WARPSYNC MEMBAR YIELD DEPBAR CS2R ERRBAR",
}
UNIT_OF = {op: unit for unit, ops in _UNITS.items() for op in ops.split()}  # all others are INTEGER
CYCLES = {FLOAT: 2, INTEGER: 2, SPECIAL: 8, UNIFORM: 2, CONTROL: 1}  # for which a unit is busy with a warp
SPECIAL_LATENCY = 22

SMEM_LATENCY, GLOBAL_LATENCY, OTHER_LATENCY = 24, 500, 30  # cycles until the result of a memory instruction is there
MEMORY_ISSUE, MEMORY_DELAY = 2, 4  # cycles between two memory instructions of a partition, and until one is at the unit
QUEUE_CYCLES = 40  # work that shared memory and the path to global memory queue before they accept no more
BARRIER_LATENCY = 20
BLOCK_STAGGER, BLOCK_LAUNCH = 400, 300  # cycles between the first blocks, and between two in the same place
DRAM_SHARE = 0.8  # of the data sheet's bytes per second, which a kernel reaches
LAUNCH_SECONDS = 4e-6  # from one kernel's end to the next one's start

SOURCES = (
    (
        "V100 80 multiprocessors at 1.53 GHz, 900 GB/s; T4 40 at 1.59 GHz, 320 GB/s; A100 108 at 1.41 GHz, 1555 GB/s",
        "NVIDIA's data sheets; boost clocks, which a T4 with its 70 W does not hold under load",
    ),
    (
        "4 partitions, an instruction each in a cycle; 16 lanes for float and 16 for integer instructions, 4 for "
        "special functions and conversions; 64 K registers; 96, 64, 164 KB of shared memory; 64, 32, 64 warps",
        "CUDA C++ Programming Guide, compute capabilities 7.0, 7.5, 8.0",
    ),
    (
        "a partition's tensor cores take 2 cycles for a step of m8n8k4, 8 for m16n8k8 on the T4, 8 for m16n8k16 on the "
        "A100",
        "what 125, 65 and 312 TFLOP/s of the data sheets imply",
    ),
    (
        "on the A100, m16n8k8 takes 8 cycles, too",
        "fitted: the public kernel has no other; with 4 its ratios are 0.79 to 0.88 instead of 0.84 to 0.98",
    ),
    (
        "tensor cores answer 10, 14, 18 cycles later",
        "assumed; with 8 warps and more, 8 and 16 make no difference",
    ),
    (
        "shared memory: 128 bytes per cycle; a load of 16 bytes takes 2 cycles, since half of the lanes read the same, "
        "a store 4; a shuffle 2. 24 cycles of latency",
        "assumed: addresses are not known, as nothing is executed, and so neither are bank conflicts",
    ),
    (
        "a load from global memory takes 500 cycles, a barrier 20; 40 cycles of queued work before a memory "
        "instruction cannot be issued; 300 cycles between two blocks, 400 between the first ones; a kernel reaches "
        "0.8 of the data sheet's bytes per second; 4 us between two kernels",
        "assumed",
    ),
    (
        "free of charge: instruction fetches, banks of registers, misses of L2, power",
        "not modelled; what they cost is in the band of the calibration",
    ),
)
