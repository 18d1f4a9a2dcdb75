"""NVIDIA's cards as XLA's compiler is told of them, by their public figures.

Names of figures are those of XLA's GpuTargetConfigProto, in its text form.
"""

from typing import NamedTuple


class Card(NamedTuple):
    """What differs between cards of one generation."""

    memory: int  # bytes
    bandwidth: int  # bytes a second


# NVIDIA's data sheets of the SXM cards.
CARDS = {
    "h100": Card(80 * 10**9, 3_350 * 10**9),
    "h200": Card(141 * 10**9, 4_800 * 10**9),
}
_HOPPER = {
    # NVIDIA H100 Tensor Core GPU Architecture, white paper, the SXM5 card.
    "core_count": 132,
    "fpus_per_core": 128,
    "l2_cache_size": 50 * 2**20,
    "clock_rate_ghz": 1.98,
    # CUDA C++ Programming Guide, technical specifications, compute capability 9.0.
    "threads_per_warp": 32,
    "threads_per_block_limit": 1024,
    "threads_per_core_limit": 2048,
    "block_dim_limit_x": 2**31 - 1,  # blocks of a grid
    "block_dim_limit_y": 2**16 - 1,
    "block_dim_limit_z": 2**16 - 1,
    "registers_per_block_limit": 2**16,
    "registers_per_core_limit": 2**16,
    "shared_memory_per_block": 48 * 2**10,
    "shared_memory_per_block_optin": 227 * 2**10,
    "shared_memory_per_core": 228 * 2**10,
}


def target_config(card: Card) -> str:
    """What the compiler is to compile for."""
    figures = _HOPPER | {
        "device_memory_size": card.memory,
        "memory_bandwidth": card.bandwidth,
    }
    lines = [f"  {name}: {value}" for name, value in figures.items()]
    lines.append("  cuda_compute_capability { major: 9 minor: 0 }")
    info = "\n".join(lines)
    return f'gpu_device_info {{\n{info}\n}}\nplatform_name: "CUDA"\n'
