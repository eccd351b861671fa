"""Depth-weighted averages of representations in one buffer, x_n = Σ_{m≤n} α_m·y_m: the public operations."""

from kernels.depth_mix.fused import FusedMixes, is_fused
from kernels.depth_mix.op import buffer, depth_mix, depth_mix_backward

__all__ = ["FusedMixes", "buffer", "depth_mix", "depth_mix_backward", "is_fused"]
