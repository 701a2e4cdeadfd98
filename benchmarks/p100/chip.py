"""The P100: its cards, the rates and latencies of a multiprocessor, and the source of each number."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

# Per multiprocessor; a scheduler has 32 lanes, 8 special-function lanes and half of the registers.
SCHEDULERS = 2
REGISTERS, REGISTER_UNIT = 65536, 256  # registers are allocated to a warp in units
SMEM, SMEM_UNIT = 64 << 10, 256  # bytes; a block gets them in units
MAX_WARPS, MAX_BLOCKS = 64, 32  # resident
SMEM_BYTES_PER_CYCLE = 128
L2_BYTES = 4 << 20  # of the card


@dataclass(frozen=True)
class Card:
    """A product with this chip."""

    name: str
    clock_hz: float
    dram_bytes_per_s: float  # as the data sheet says
    multiprocessors: int = 56
    dram_share: float = 0.78  # the part of these bytes per second that a kernel reaches
    l2_bytes_per_s: float = 1624e9

    @property
    def peak_flops(self) -> float:
        """Fused multiply-adds of every lane in every cycle, two operations each."""
        return 2 * 32 * SCHEDULERS * self.multiprocessors * self.clock_hz

    def microseconds(self, cycles: float) -> float:
        return cycles / self.clock_hz * 1e6

    def dram_bytes_per_cycle(self) -> float:
        """The bandwidth of DRAM for the whole card."""
        return self.dram_share * self.dram_bytes_per_s / self.clock_hz

    def l2_bytes_per_cycle(self) -> float:
        """The bandwidth of L2 for the whole card."""
        return self.l2_bytes_per_s / self.clock_hz


SXM2 = Card("Tesla P100 SXM2", 1.480e9, 732e9)
PCIE = Card("Tesla P100 PCIe", 1.303e9, 732e9)
QUADRO = Card("Quadro GP100", 1.443e9, 717e9)
# The least clock at which published products of vanilla attention stay below the peak of the card that they ran on; see
# benchmarks/data/README.md.
QUADRO_CLOCK_OF_PRODUCTS_HZ = 1.50e9
CARDS = {"sxm2": SXM2, "pcie": PCIE, "quadro": QUADRO}


def resident_blocks(threads: int, registers: int, smem: int) -> int:
    """The number of blocks of a kernel that are resident on one multiprocessor.

    Args:
        threads: per block.
        registers: per thread.
        smem: bytes of shared memory per block.
    """
    warps = -(-threads // 32)
    registers_per_warp = _rounded_up(32 * registers, REGISTER_UNIT)
    by_registers = REGISTERS // SCHEDULERS // registers_per_warp * SCHEDULERS // warps
    by_smem = SMEM // _rounded_up(smem, SMEM_UNIT) if smem else MAX_BLOCKS
    return min(MAX_BLOCKS, MAX_WARPS // warps, by_registers, by_smem)


def _rounded_up(amount: int, unit: int) -> int:
    return -(-amount // unit) * unit


# ---- units and the time that instructions take on them ----

# Kinds of units: FP32 and SFU once per scheduler, the others once per multiprocessor.
FP32, SFU, SHARED, GLOBAL, CONTROL = range(5)


class Timing(NamedTuple):
    """Issue cycles and latencies of one instruction of one warp."""

    unit: int
    cycles: int  # for which the unit is busy, without bank conflicts; on SHARED and GLOBAL, at least
    latency: int = 0  # until the scoreboard of the result is released; without one, the stall counts cover it
    read_latency: int = 12  # until the scoreboard of the operands is released


_TABLE = {
    Timing(FP32, 1): "FFMA FADD FMUL FFMA32I FADD32I FMUL32I HFMA2 HADD2 HMUL2 IADD IADD32I IADD3 XMAD LOP LOP32I LOP3 "
    "MOV MOV32I SEL LEA ISCADD ISCADD32I PRMT CSETP P2R R2P VOTE",
    Timing(FP32, 2): "FMNMX FCMP FSET FSETP FCHK IMNMX ICMP ISET ISETP SHL SHR SHF BFE BFI PSET PSETP",
    Timing(SFU, 4, latency=20): "MUFU RRO F2F F2I I2F I2I POPC FLO",
    Timing(SHARED, 1, latency=24, read_latency=6): "LDS STS SHFL ATOMS",
    Timing(GLOBAL, 1, latency=0, read_latency=30): "LDG STG LD ST LDL STL ATOM RED",
    Timing(CONTROL, 0, latency=25, read_latency=15): "S2R CS2R LDC DEPBAR MEMBAR BAR NOP SSY SYNC PBK BRK PCNT CONT "
    "BRA BRX CAL RET EXIT",
}
TIMINGS = {op: timing for timing, ops in _TABLE.items() for op in ops.split()}
_FROM_FLOAT16 = Timing(CONTROL, 0)


def timing_of(op: str, modifiers: tuple[str, ...]) -> Timing:
    """The timing of an instruction; HADD2.F32, which converts float16 to float32, is not one of the FP32 lanes."""
    return _FROM_FLOAT16 if op == "HADD2" and "F32" in modifiers else TIMINGS[op]


L2_LATENCY, DRAM_LATENCY = 234, 450  # cycles of a load that misses everything nearer
SUMMING_DRAM_LATENCY = 800  # cycles of a load from DRAM, in blocks that add to what they have written to global memory
BARRIER_LATENCY = 20  # cycles from the last warp's arrival
BANDWIDTH_CREDIT = 5000  # cycles for which unused bandwidth of L2 and DRAM can still be used later
QUEUE_CYCLES = 40  # work that SHARED and GLOBAL queue before they accept no further instruction
BLOCK_STAGGER = 1500  # cycles between the first blocks of a multiprocessor, so that they do not run in phase
BLOCK_LAUNCH = 300  # cycles from the end of a block to the start of the next one in its place
LAUNCH_SECONDS = 4e-6  # from one kernel's end to the next one's start, where they follow one another in a stream

# The number or rule, and its source; rows of the table of assumptions in docs/p100_report.md.
SOURCES = (
    (
        "SXM2 1.480 GHz, PCIe 1.303 GHz (both boost clocks; 10.6 and 9.3 TFLOP/s), 56 multiprocessors, 732 GB/s",
        "NVIDIA's data sheet of the Tesla P100",
    ),
    (
        "Quadro GP100: 1.443 GHz, so that the peak is the 10.3 TFLOP/s of its data sheet; 717 GB/s",
        "NVIDIA's data sheet of the Quadro GP100; published products of vanilla attention are faster than that and "
        "need 1.50 GHz at least, so whether the published times were taken at this clock is not known",
    ),
    (
        "two schedulers, each with 32 lanes and half of 64 K registers; registers in units of 256 per warp; 64 KB of "
        "shared memory in units of 256 bytes; 64 warps, 32 blocks",
        "CUDA C++ Programming Guide, technical specifications of compute capability 6.0; cuda_occupancy.h of CUDA 11",
    ),
    (
        "lane rates: 64 per cycle and multiprocessor for float and integer addition, multiplication, logic and moves; "
        "32 for comparisons, minima, shifts and bit fields; 16 for special functions and conversions; 32 for shuffles",
        "CUDA C++ Programming Guide, throughput of native arithmetic instructions, column 6.0; which machine "
        "instruction belongs to which row is known from the assembler maxas",
    ),
    (
        "HADD2.F32, which converts float16 to float32, takes an issue slot and no lane",
        "fitted: on the lanes, these alone would be busy for longer than published in 13 of 21 rows of float16 in "
        "`docs/p100_calibration.md`",
    ),
    (
        "an atomic operation on shared memory takes a cycle for every lane that wants the bank with most of them",
        "assumed; only the public kernels of `docs/p100_calibration.md` have any",
    ),
    (
        "registers lie in 4 banks; an operand beyond the first of a bank costs a cycle of the float pipe, unless the "
        "reuse cache holds it",
        "maxas (written for Maxwell); the compiler emits the same code for 5.2 and 6.0. Not measured on a P100",
    ),
    (
        "two instructions that the compiler pairs are issued in one cycle, by one scheduler, if both units are free",
        "the control words; that the P100 honours them is assumed. The spread of the calibration is the same with and "
        "without",
    ),
    (
        "shared memory gives 128 bytes per cycle; how many such accesses an instruction needs comes from the addresses",
        "CUDA C++ Programming Guide, shared memory of 5.x and 6.x",
    ),
    (
        "latencies: shared memory 24 cycles, L2 234, DRAM 450",
        "Jia et al. 2018, arXiv:1804.06826, the columns of the P100; quoted from memory",
    ),
    (
        "the L2 cache gives 1624 GB/s to the whole card",
        "Jia et al. 2018, arXiv:1804.06826, the columns of the P100; quoted from memory",
    ),
    (
        "a multiprocessor that loads less than its share of L2 and DRAM can load more for the next 5000 cycles: "
        "the others are at other places of their blocks",
        "assumed, and chosen after seeing results: from 0 to 10000 cycles, forward rates of trial kernels rose by 3 "
        "(512 tokens) to 17 % (128 tokens); the column in step takes it away",
    ),
    (
        "L2 has 4 MB, in equal shares for all resident blocks; each share keeps what was used last. What another block "
        "used is found only if both run at once or if all of it fits; loads are not kept in L1",
        "the size from NVIDIA's data sheet; the rest is assumed",
    ),
    (
        "a kernel reaches 0.78 of the data sheet's bytes per second of DRAM",
        "assumed. Public are 444 GB/s (0.61) of a device-to-device copy on a PCIe card (gearshifft, pull request 82). "
        "The column of half the rate shows what hangs on it",
    ),
    (
        "a load from DRAM takes 800 cycles in a block that reads again what it has written, to add to it",
        "fitted to the backward in float32 of `docs/p100_calibration.md`, whose 4 warps wait for it; one constant for "
        "all rows, chosen with every other row in view. 450 there leaves 20 to 25 % of its time unexplained; that "
        "DRAM which is read and written in turn answers later is the presumed reason",
    ),
    (
        "a barrier takes 20 cycles, special functions 20; 300 cycles between two blocks, "
        "1500 between the first ones of a multiprocessor, which are out of phase after some waves anyway; "
        "4 us between two kernels; 40 cycles of queued work before a memory instruction cannot be issued",
        "assumed; the 1500 were chosen after seeing results, which differ by a tenth between 40 and 10000",
    ),
    (
        "free of charge: instruction fetches, tags of the L1 cache, address translation, error correction, the memory "
        "fence that the compiler puts behind every barrier (one issue slot), throttling of the clock",
        "not modelled; what they cost is in the band of `docs/p100_calibration.md`",
    ),
)
