"""The fused primitive on CPUs, compiled by numba."""
