"""Compile the Triton kernels for a GPU that need not be present: `python tests/support/compile_kernels.py 80`.

Prints the name of each kernel that compiles. Below compute capability 9.0 the kernels that compute with words are skipped, as in the backend.
"""

import sys
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from nmsweep.kernels.triton.backend import FLAT_CONFIGS, PACKED_CONFIGS
from nmsweep.kernels.triton.kernels import centre_kernel, flat_kernel, packed_median_kernel, row_kernel, scaled_kernel
from nmsweep.kernels.triton.norms import squares_kernel
from nmsweep.kernels.triton.packed import packed_kernel, packed_row_kernel
from nmsweep.kernels.triton.parts import make_kernel

NAN = 0x7F817F81
NUMBERS = dict.fromkeys(
    ("rows_per_weight", "n_groups", "groups_per_row", "hidden", "tokens", "N"), "i32"
)  # arguments that are no constants of a kernel
POINTERS = {
    "x_ptr": "*i16", "u_ptr": "*i16", "weight_ptr": "*fp32", "eta_ptr": "*fp32", "counts_ptr": "*i64", "nu_ptr": "*fp32",
    "scale_ptr": "*fp32", "gain_ptr": "*i16", "z_ptr": "*bf16", "padding_ptr": "*i8", "partial_ptr": "*fp64",
}  # fmt: skip
WORDS = {"x_ptr": "*i32", "u_ptr": "*i32", "gain_ptr": "*i32"}

ANYWHERE: dict[Any, dict[str, Any]] = {
    flat_kernel: {"N": 8, "M": 16, "KIND": 0, "ETA": 3, "GAIN": 1, "PIECE": 8, "P": 16, "G": FLAT_CONFIGS[16][0]},
    row_kernel: {"KIND": 0, "ETA": 3, "VAR": True, "T": 512, "B": 512},
    scaled_kernel: {"N": 8, "M": 16, "KIND": 0, "ETA": 3, "PIECE": 8, "P": 16, "G": 128},
    centre_kernel: {"KIND": 0, "STAT": 1, "P": 8, "G": 128},
    make_kernel: {"KIND": 0, "GAIN": 1, "B": 2048},
    squares_kernel: {"TOKENS": 256, "CHANNELS": 128, "STEP": 16},
}
HOPPER: dict[Any, dict[str, Any]] = {
    packed_kernel: {"N": 8, "M": 16, "KIND": 0, "GAIN": 3, "NAN": NAN, "ROW": 60, "G": PACKED_CONFIGS[16][0]},
    packed_row_kernel: {"KIND": 0, "GAIN": 3, "NAN": NAN, "T": 512},
    packed_median_kernel: {"KIND": 0, "T": 512},
}


def compiled(kernel: Any, constants: dict[str, Any], capability: int, pointers: dict[str, str]) -> None:
    known = {**NUMBERS, **pointers}
    constants = {**constants, **{name: None for name in kernel.arg_names if name not in {**known, **constants}}}
    signature = {name: "constexpr" if name in constants else known[name] for name in kernel.arg_names}
    triton.compile(
        ASTSource(kernel, signature, constants),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": 4, "enable_fp_fusion": False},
    )
    print(kernel.__name__)


if __name__ == "__main__":
    for kernel, constants in ANYWHERE.items():
        compiled(kernel, constants, int(sys.argv[1]), POINTERS)
    if int(sys.argv[1]) >= 90:
        for kernel, constants in HOPPER.items():
            compiled(kernel, constants, int(sys.argv[1]), {**POINTERS, **WORDS})
