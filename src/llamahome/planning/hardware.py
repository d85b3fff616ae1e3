"""Devices and their links: data sheet figures, and the share of them that is reached in practice."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Device:
    """One GPU or CPU that trains, and its links to the others."""

    name: str
    tflops: float
    """Peak of dense bfloat16 matrix products with float32 accumulation, 10^12 operations per second."""
    mfu: float
    """Share of the peak that a training step reaches while it computes, without communication."""
    memory_bytes: int
    memory_gbps: float
    """Memory bandwidth, 10^9 bytes per second."""
    inside_gbps: float
    """Usable rate to the other devices of its node, 10^9 bits per second in each direction."""
    between_gbps: float
    """Usable rate of its share of the network between nodes, 10^9 bits per second in each direction."""
    per_node: int
    hop_seconds: float = 3e-6
    """Latency of one step of a ring."""

    @property
    def flops(self) -> float:
        """Operations per second while it computes."""
        return self.tflops * 1e12 * self.mfu


_NVLINK_SHARE, _NETWORK_SHARE = 0.755, 0.85
"""Usable shares of NVLink (340 of 450 GB/s) and of a network adapter (340 of 400 Gb/s) in large ring collectives."""
DEVICES: Mapping[str, Device] = {
    # NVIDIA H100 data sheet, SXM5: 989 TFLOP/s dense, 80 GB at 3.35 TB/s, NVLink 900 GB/s both ways; DGX H100: 8 x 400 Gb/s.
    # 0.40: Llama-3-8B LoRA at 402 and Llama-3-70B pre-training at 389 model TFLOP/s per H100 (NeMo AutoModel, performance summary, 2026).
    "h100": Device("h100", 989.0, 0.40, 80 * 10**9, 3350.0, 3600.0 * _NVLINK_SHARE, 400.0 * _NETWORK_SHARE, 8),
    # NVIDIA H200 data sheet, SXM: as the H100 but 141 GB at 4.8 TB/s.
    "h200": Device("h200", 989.0, 0.40, 141 * 10**9, 4800.0, 3600.0 * _NVLINK_SHARE, 400.0 * _NETWORK_SHARE, 8),
    # NVIDIA A100 data sheet, SXM4 80 GB: 312 TFLOP/s dense, 2.04 TB/s, NVLink 600 GB/s both ways; DGX A100: 8 x 200 Gb/s.
    # 0.50: large decoders reach between 42 and 56 % on it in "Reducing Activation Recomputation" (arXiv 2205.05198).
    "a100": Device("a100", 312.0, 0.50, 80 * 10**9, 2039.0, 2400.0 * _NVLINK_SHARE, 200.0 * _NETWORK_SHARE, 8),
}
