"""Runs the Triton kernels under Triton's interpreter, which must be switched on before triton is imported.

Run as a module with a path, where it leaves the results of all cases.
"""

import os
import sys

os.environ["TRITON_INTERPRET"] = "1"

import torch


def main(path: str) -> None:
    from lightning_efficient.lora_fa import projection, triton_ops
    from lightning_efficient.lora_fa.gated_mlp import _chosen
    from tests.lora_fa.test_triton import CASES, case, gate_case, gated_block, masks_by

    assert projection.runs_on_triton(torch.zeros(1))
    results = {
        "products": {name: case(name, triton_ops.project, triton_ops.add_expanded) for name in CASES},
        "gates": {dtype: gate_case(dtype, _chosen("silu", torch.zeros(1))) for dtype in ("float32", "bfloat16")},
        "masks": masks_by(triton_ops.project),
        "block": gated_block(),
    }
    torch.save(results, path)


if __name__ == "__main__":
    main(sys.argv[1])
