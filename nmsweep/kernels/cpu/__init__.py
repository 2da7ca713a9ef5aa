"""The fused primitive on CPUs: numba loops in `kernel.py`, called by `backend.py`.

Time per element in ns (bf16, [512, 576], one thread of an AMD EPYC with AVX-512, minimum of 25 calls), against the kernel of 1,515 lines with
hand-written LLVM vectors that this one replaces:

| | 8:16 act | 8:16 of a norm | 8:16 of a product | 8:16 weight | 8:16 shift+var | 16:32 act |
|:--|--:|--:|--:|--:|--:|--:|
| hand-written vectors | 0.22 | 0.38 | 0.32 | 0.41 | 0.92 | 0.25 |
| these loops | 0.46 | 0.68 | 0.58 | 0.73 | 1.80 | 0.59 |

In a forward pass of SmolLM2-135M's shape (bf16, two cores, old and new in turns) that is 1.047 against 1.048 of dense for 8:16 `act` and 1.121 against 1.076 for `shift+var`; on an Intel Xeon
with AMX and busy neighbours 1.105 against 1.031 and 1.354 against 1.150. One intrinsic is left, an atomic add by which threads share chunks.
"""
