"""The operators of a MoE layer. `reference` is the specification, and the only road so far."""

from lightmoe.kernels.reference import combine, grouped_gemm, matmul, permute, swiglu, topk_gate

__all__ = ["combine", "grouped_gemm", "matmul", "permute", "swiglu", "topk_gate"]
