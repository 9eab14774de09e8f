"""Runs the Triton kernels under Triton's interpreter, which must be switched on before triton is imported.

Run as a module with a path, where it leaves the results of all cases.
"""

import os
import sys

os.environ["TRITON_INTERPRET"] = "1"

import torch


def main(path: str) -> None:
    from lightning_efficient.moe import torch_ops, triton_ops
    from lightning_efficient.moe.ops import _functions_for
    from tests.moe.test_triton_ops import GATES, MOVES, gate_case, move_case

    for rows, experts, functions in (
        (torch.zeros(1), 256, triton_ops),
        (torch.zeros(1, dtype=torch.bfloat16), 8, triton_ops),
        (torch.zeros(1), 257, torch_ops),
        (torch.zeros(1, dtype=torch.float64), 8, torch_ops),
    ):
        assert _functions_for(rows, experts) is functions
    large_C, triton_ops._SCAN_C = triton_ops._SCAN_C, 16  # several steps of the scan, as with many tokens
    gates = {name: gate_case(name) for name in GATES}
    triton_ops._SCAN_C, triton_ops._BLOCKS = large_C, 1  # blocks as large as with many tokens
    large = {name: gate_case(name) for name in GATES}
    torch.save({"gates": gates, "large": large, "moves": {name: move_case(name) for name in MOVES}}, path)


if __name__ == "__main__":
    main(sys.argv[1])
