"""Trains with the Triton kernels under Triton's interpreter, which must be switched on before triton is imported.

Run as a module with a path, where it leaves the final weights of all cases.
"""

import os
import sys

os.environ["TRITON_INTERPRET"] = "1"

import torch


def main(path: str) -> None:
    from tests.eva.test_backends import CASES, DTYPES, mixed_groups, trained, transposed_gradients

    weights = {dtype: {case: trained(case, "triton", dtype) for case in CASES} for dtype in DTYPES}
    torch.save({**weights, "mixed groups": mixed_groups("triton"), "transposed": transposed_gradients("triton")}, path)


if __name__ == "__main__":
    main(sys.argv[1])
