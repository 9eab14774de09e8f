"""The Triton kernels compile for a GPU, with wide loads where memory allows them: no GPU is needed to see that."""

import re
from typing import Any

import pytest

triton = pytest.importorskip("triton")

FLOATS = ("a_ptr", "u_ptr", "square_ptr", "left_ptr", "scale_ptr", "lr_ptr", "mu_ptr", "decay_ptr")


def assembly(kernel: Any, **constants: Any) -> str:
    """The PTX of a kernel for compute capability 9.0."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kinds = {
        name: "constexpr" if name in constants else "*fp32" if name in FLOATS else "*i64" for name in kernel.arg_names
    }
    source = ASTSource(kernel, signature=kinds, constexprs=constants)
    return str(triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["ptx"])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["float32", "bfloat16"])
def test_aligned_matrices_are_read_and_written_sixteen_bytes_at_a_time(name: str) -> None:
    import triton.language as tl

    from lightning_efficient.eva.triton_kernels import project_kernel, update_kernel

    if not hasattr(project_kernel, "arg_names") or type(project_kernel).__name__ == "InterpretedFunction":
        pytest.skip("TRITON_INTERPRET is set: kernels are interpreted, not compiled")
    dtype, entries = getattr(tl, name), 4 if name == "float32" else 8
    common = {"dtype": dtype, "wide": tl.float32}
    wide = re.compile(r"(ld|st)\.global\.v4\.b32")

    for align in (1, entries):
        project = assembly(project_kernel, **common, align=align, BLOCK_O=16, BLOCK_D=256)
        update = assembly(
            update_kernel,
            **common,
            align=align,
            has_momentum=True,
            nesterov=False,
            decoupled=False,
            BLOCK_O=8,
            BLOCK_D=512,
        )
        assert {found[1] for found in wide.finditer(update)} == ({"ld", "st"} if align > 1 else set())
        assert {found[1] for found in wide.finditer(project)} == ({"ld"} if align > 1 else set())
