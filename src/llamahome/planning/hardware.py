"""Devices and the links between them: figures of data sheets, and what is left of them in practice."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Device:
    """One processor that trains, and how it reaches the others."""

    name: str
    tflops: float
    """Peak of bfloat16 products with float32 sums, dense, 10^12 operations a second."""
    mfu: float
    """Share of the peak that a training step reaches while it computes."""
    memory_bytes: int
    memory_gbps: float
    """Memory bandwidth, 10^9 bytes a second."""
    inside_gbps: float
    """Usable rate to the others of its machine, 10^9 bits a second in each direction."""
    between_gbps: float
    """Usable rate of its share of the network between machines, 10^9 bits a second in each direction."""
    per_node: int
    hop_seconds: float = 3e-6
    """What a step of a ring costs beside its bytes."""

    @property
    def flops(self) -> float:
        """Operations a second while it computes."""
        return self.tflops * 1e12 * self.mfu


_INSIDE, _BETWEEN = 0.755, 0.85
"""Usable shares of NVLink (340 of 450 GB/s) and of a network adapter (340 of 400 Gb/s) in large ring exchanges."""
DEVICES: Mapping[str, Device] = {
    # NVIDIA H100 data sheet, SXM5: 989 TFLOP/s dense, 80 GB at 3.35 TB/s, NVLink 900 GB/s both ways; DGX H100: 8 x 400 Gb/s.
    # 0.40: Llama-3-8B LoRA at 402 and Llama-3-70B pre-training at 389 model TFLOP/s per H100 (NeMo AutoModel, performance summary, 2026).
    "h100": Device("h100", 989.0, 0.40, 80 * 10**9, 3350.0, 3600.0 * _INSIDE, 400.0 * _BETWEEN, 8),
    # NVIDIA H200 data sheet, SXM: as the H100 but 141 GB at 4.8 TB/s.
    "h200": Device("h200", 989.0, 0.40, 141 * 10**9, 4800.0, 3600.0 * _INSIDE, 400.0 * _BETWEEN, 8),
    # NVIDIA A100 data sheet, SXM4 80 GB: 312 TFLOP/s dense, 2.04 TB/s, NVLink 600 GB/s both ways; DGX A100: 8 x 200 Gb/s.
    # 0.50: between the 42 and 56 % that large decoders reach on it in "Reducing Activation Recomputation" (arXiv 2205.05198).
    "a100": Device("a100", 312.0, 0.50, 80 * 10**9, 2039.0, 2400.0 * _INSIDE, 200.0 * _BETWEEN, 8),
}
