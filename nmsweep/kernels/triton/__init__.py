"""The fused primitive on GPUs, written in Triton."""
