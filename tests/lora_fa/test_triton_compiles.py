"""The Triton kernels compile for a GPU: none is needed to see that."""

from typing import Any

import pytest

triton = pytest.importorskip("triton")


def assembly(kernel: Any, pointer: str, **constants: Any) -> str:
    """The PTX of a kernel for compute capability 9.0."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    def kind(name: str) -> str:
        if name in constants:
            return "constexpr"
        return f"*{pointer}" if name.endswith("_ptr") else "fp32" if name == "scale" else "i32"

    signature = {name: kind(name) for name in kernel.arg_names}
    source = ASTSource(kernel, signature=signature, constexprs=constants)
    return str(triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["ptx"])


@pytest.mark.slow
@pytest.mark.parametrize("pointer", ["fp32", "bf16"])
@pytest.mark.parametrize("drop", [True, False])
def test_every_kernel_compiles(pointer: str, drop: bool) -> None:
    import triton.language as tl

    from lightning_efficient.lora_fa import triton_kernels as kernels

    if type(kernels.project_kernel).__name__ == "InterpretedFunction":
        pytest.skip("TRITON_INTERPRET is set: kernels are interpreted, not compiled")
    dtype = {"fp32": tl.float32, "bf16": tl.bfloat16}[pointer]
    blocks = {"precision": "ieee", "DROP": drop, "BLOCK_T": 64, "BLOCK_K": 64, "BLOCK_R": 32}

    for kernel, constants in (
        (kernels.project_kernel, {"dtype": dtype, **blocks}),
        (kernels.expand_kernel, {"dtype": dtype, "dx_dtype": dtype, **blocks}),
        (kernels.swiglu_kernel, {"dtype": dtype, "BLOCK": 1024}),
        (kernels.swiglu_gradient_kernel, {"dtype": dtype, "BLOCK": 1024}),
    ):
        assert ".target sm_90" in assembly(kernel, pointer, **constants)
