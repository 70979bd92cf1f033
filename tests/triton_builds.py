"""Compiles the Triton kernels ahead of time, for any compute capability, and reads what came out.

`python tests/triton_builds.py` prints registers, spills and wide loads of every form; it needs no
GPU. Not under `TRITON_INTERPRET=1`, where kernels are no code.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget

from cruxy_exact import BlockCode
from cruxy_torch import CruxyOptimizer, _step
from cruxy_torch._kept import Coded, Rounded
from cruxy_torch._native import (
    triton_law,
    triton_matrices,
    triton_passes,
    triton_steps,
    triton_tensors,
    triton_whole,
)
from cruxy_torch._native.triton_kernels import ROWS
from cruxy_torch._native.triton_passes import Form
from cruxy_torch._sensors.sizes import Sizes

CAPABILITIES = (75, 80, 89, 90)
_POINTERS = {
    "table": "*i64", "chunks": "*i32", "starts": "*i32", "counters": "*i32", "ok_at": "*u8",
    "key_at": "*i32",
}  # fmt: skip
_NUMBERS = {"tensors": "i32", "tiles": "i32", "count": "i32"}


class Built(NamedTuple):
    """What a kernel was compiled to."""

    registers: int
    spilled: int
    wide_loads: int
    narrow_loads: int
    wide_stores: int
    atomics: int
    ordered_atomics: int
    """Those that acquire and release on the whole device, behind a barrier of the program."""


def form(bits: Any, *, signed: bool) -> Form:
    """Of a moment in so many bits."""
    empty = torch.empty(0)
    if bits in (8, 4):
        return Form.of(Coded(empty, empty, BlockCode(bits, signed), torch.Size([0]), 0))
    if bits == 16:
        return Form.of(Rounded(empty.to(torch.bfloat16), 0))
    return Form.of(empty.to(torch.bfloat16) if bits == "bfloat16" else empty)


def update_constants(**of: Any) -> dict[str, Any]:
    """What a form of the update knows at compile time.

    Args:
        of: `bits` of moments, `half` for bfloat16 parameters, `lion`, `averaged`, `aligned`,
            `chance` for parameters rounded by chance.
    """
    bits, half = of.get("bits", 32), int(of.get("half", False))
    first, second = form(bits, signed=True), form(bits, signed=False)
    if of.get("lion"):
        second = Form(-1)
    return {
        "P": half, "P_CHANCE": of.get("chance", False), "G": half,
        "M": first.format, "M_CHANCE": first.chance, "M_SHIFT": first.shift, "M_TOP": first.top,
        "M_LEAST": first.least,
        "V": second.format, "V_CHANCE": second.chance, "V_SHIFT": second.shift,
        "V_TOP": second.top, "V_LEAST": second.least,
        "NESTEROV": not of.get("lion", False), "COUPLED": False,
        "AVERAGED": of.get("averaged", False), "PULLED": of.get("pulled", False),
        "LIMITED": of.get("averaged", False), "STEERED": False, "ALIGNED": of.get("aligned", True),
        "ROWS": ROWS,
    }  # fmt: skip


def sums_constants(**of: Any) -> dict[str, Any]:
    """What a form of the sums knows at compile time; `momenta` for those of the alignment."""
    first = form(of.get("bits", 32), signed=True)
    return {
        "G": int(of.get("half", False)), "M": first.format if of.get("momenta") else -1,
        "M_SHIFT": first.shift, "M_TOP": first.top,
        "P": int(of.get("half", False)) if of.get("params") else -1,
        "POWER": of.get("power", 0), "ALIGNED": of.get("aligned", True), "ROWS": ROWS,
    }  # fmt: skip


def tensor_constants(**of: Any) -> dict[str, Any]:
    """What a form of a kernel for one tensor may know at compile time."""
    half, first = int(of.get("half", False)), form(of.get("bits", 32), signed=True)
    second = form(of.get("bits", 32), signed=False)
    return {
        **second.named("V"), "NESTEROV": True,
        "G": half, "P": half, "P_CHANCE": bool(half), "STEERED": False, "TURNED": False,
        "SIZED": False, "M": first.format, "M_CHANCE": first.chance, "M_SHIFT": first.shift,
        "M_TOP": first.top, "M_LEAST": first.least, "ALIGNED": True, "ROWS": ROWS,
        "HEIGHT": triton_matrices.HEIGHT, "WIDTH": triton_matrices.WIDTH,
    }  # fmt: skip


FORMS: dict[str, tuple[str, dict[str, Any]]] = {
    "sums": ("sums_of_chunks", sums_constants()),
    "sums, any power": ("sums_of_chunks", sums_constants(power=2)),
    "sums with moments": ("sums_of_chunks", sums_constants(momenta=True)),
    "sums with moments and parameters": (
        "sums_of_chunks", sums_constants(momenta=True, params=True)
    ),
    "sums with 8-bit moments": ("sums_of_chunks", sums_constants(momenta=True, bits=8)),
    "sums with 4-bit moments": ("sums_of_chunks", sums_constants(momenta=True, bits=4)),
    "sums of bfloat16": ("sums_of_chunks", sums_constants(half=True)),
    "sums of tensors": ("sums_of_tensors", {"WIDTH": 256}),
    "sums of all": ("sums_of_all", {"WIDTH": 1024}),
    "Adam": ("update_of_chunks", update_constants()),
    "Adam, not aligned": ("update_of_chunks", update_constants(aligned=False)),
    "Adam with average and limit": ("update_of_chunks", update_constants(averaged=True)),
    "Adam with an average that pulls": (
        "update_of_chunks", update_constants(averaged=True, pulled=True)
    ),
    "Lion": ("update_of_chunks", update_constants(lion=True)),
    "Adam, bfloat16": ("update_of_chunks", update_constants(half=True, bits=16, chance=True)),
    "Adam, 16 bits": ("update_of_chunks", update_constants(bits=16)),
    "Adam, 8 bits": ("update_of_chunks", update_constants(bits=8)),
    "Adam, 4 bits": ("update_of_chunks", update_constants(bits=4)),
    "Adam, 8 bits, bfloat16 by chance, average": (
        "update_of_chunks", update_constants(bits=8, half=True, chance=True, averaged=True)
    ),
    "Adam, 4 bits, average": ("update_of_chunks", update_constants(bits=4, averaged=True)),
    "Lion, 8 bits": ("update_of_chunks", update_constants(bits=8, lion=True)),
    "Lion, 4 bits": ("update_of_chunks", update_constants(bits=4, lion=True)),
    "Adam of a tensor": ("adam_of_tensor", tensor_constants()),
    "Adam of a tensor, 4 bits": ("adam_of_tensor", tensor_constants(bits=4)),
    "sign of a tensor": ("sign_of_tensor", tensor_constants()),
    "move of a tensor": ("move_of_tensor", tensor_constants()),
    "move of a tensor, bfloat16 by chance": ("move_of_tensor", tensor_constants(half=True)),
    "momentum of a tensor": ("momentum_of_tensor", tensor_constants(bits=32)),
    "momentum of a tensor, 4 bits": ("momentum_of_tensor", tensor_constants(bits=4)),
    "squares of a matrix": ("squares_of_matrix", tensor_constants()),
    "sizes of a matrix": ("sizes_of_matrix", tensor_constants()),
    "move of a matrix": ("move_of_matrix", tensor_constants()),
    "move of a matrix, bfloat16 by chance": ("move_of_matrix", tensor_constants(half=True)),
}  # fmt: skip
"""By name the kernel and what it knows at compile time."""


SCALARS = {
    "scalars of Meta3": {},
    "scalars of self-driving, 300 tensors": {"mode": "self_driving"},
}
"""Options under which all that is computed on scalars is compiled."""


def scalars(name: str) -> tuple[Any, dict[str, str]]:
    """The kernel of a step's scalars, and the types of its arguments."""
    count = 300
    params = [torch.nn.Parameter(torch.ones(2)) for _ in range(count)]
    optimizer = CruxyOptimizer(params, **SCALARS[name])
    for param in params:
        param.grad = torch.ones_like(param)
    law_state, one = optimizer._law(), torch.ones(())
    driven = "limit_scale" in law_state
    sizes = Sizes(torch.ones(count), [2] * count) if driven else None
    measured = _step.Measured(
        torch.ones(4 if driven else 2), one, one, [sizes], one if driven else None, 2.0
    )
    groups = [optimizer._group(0)]
    found = triton_law._recorded(optimizer._settings, law_state, groups, measured)
    assert found is not None
    return found.kernel, found.types


def build(name: str, capability: int) -> Built:
    """Compiles a form for a compute capability, such as 80 for 8.0."""
    if name in SCALARS:
        kernel, types = scalars(name)
        target = GPUTarget("cuda", capability, 32)
        source = _source(kernel, types, {})
        return _read(triton.compile(source, target=target, options=triton_law.OPTIONS).asm)
    kernel_name, constants = FORMS[name]
    rooms = (triton_steps, triton_tensors, triton_whole, triton_matrices)
    room = next(module for module in rooms if kernel_name in vars(module))
    kernel = getattr(room, kernel_name)
    constants = {name: constants[name] for name in constants if name in kernel.arg_names}
    signature = {argument: _type(argument, constants) for argument in kernel.arg_names}
    target = GPUTarget("cuda", capability, 32)
    options = triton_passes.OPTIONS
    if kernel_name in ("update_of_chunks", "adam_of_tensor"):
        options = triton_passes.UPDATE_OPTIONS
    if room is not triton_steps:
        signature |= _types_of(kernel, constants)
    attributes = {}
    if kernel_name in ("squares_of_matrix", "sizes_of_matrix"):  # as they are for most matrices
        whole = ("grad", "param", "rows", "columns")
        attributes = {
            (i,): [["tt.divisibility", 16]] for i, n in enumerate(kernel.arg_names) if n in whole
        }
    source = _source(kernel, signature, constants, attributes)
    return _read(triton.compile(source, target=target, options=options).asm)


def _types_of(kernel: Any, constants: dict[str, Any]) -> dict[str, str]:
    """Types of what a kernel for one tensor is given: addresses as numbers, but for matrices."""
    address = dict.fromkeys(
        ("grad", "param", "direction", "first", "scales", "out", "first_scales", "second_scales"),
        "i64",
    )
    name = kernel.__name__
    if name == "adam_of_tensor":
        address["second"] = "i64"
    if name in ("squares_of_matrix", "sizes_of_matrix"):
        wide = "*i16" if constants.get("G") else "*fp32"
        address |= {"grad": wide, "param": wide, "first": "*fp32", "out": "*fp32"}
    if name == "move_of_matrix":
        address["first"] = "*fp32"
    numbers = dict.fromkeys(("numel", "number", "first_number", "rows", "columns"), "i32")
    found = {**address, **numbers}
    return {n: found[n] for n in kernel.arg_names if n in found}


def _type(argument: str, constants: dict[str, Any]) -> str:
    if argument in constants:
        return "constexpr"
    numbers = {**_NUMBERS, **dict.fromkeys(("gamma", "decay", "eps"), "fp32")}
    return {**numbers, **_POINTERS}.get(argument, "*fp32")


def _source(
    kernel: Any, signature: dict[str, str], constants: dict[str, Any], attributes: Any = None
) -> Any:
    if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 2):
        left = {kernel.arg_names.index(k): v for k, v in signature.items() if v != "constexpr"}
        numbered = {kernel.arg_names.index(k): v for k, v in constants.items()}
        return triton.compiler.ASTSource(kernel, left, constants=numbered)
    return triton.compiler.ASTSource(kernel, signature, constants, attributes)


def _read(asm: dict[str, Any]) -> Built:
    ptx = asm["ptx"]
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernel.cubin")
        cubin.write_bytes(asm["cubin"])
        tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        command = [str(tool), "--dump-resource-usage", str(cubin)]
        said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    used = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", said))
    count = {
        word: len(re.findall(pattern, ptx))
        for word, pattern in {
            "wide": r"ld\.global(\.\w+)*\.v4\.b32",
            "narrow": r"ld\.global(\.\w+)*\.b(8|16|32) ",
            "stores": r"st\.global(\.\w+)*\.v4\.b32",
        }.items()
    }
    atomics = re.findall(r"atom\.\S+", ptx)
    fenced = re.findall(r"bar\.sync[^;]*;(?:(?!ld\.global)[\s\S])*?atom\.global\.gpu\.acq_rel", ptx)
    spilled = int(used["STACK"]) + int(used["LOCAL"])
    return Built(
        int(used["REG"]), spilled, count["wide"], count["narrow"], count["stores"],
        len(atomics), len(fenced),
    )  # fmt: skip


def main() -> None:
    """Prints a table, or with `--json` what a test reads."""
    asked = [word for word in sys.argv[1:] if word != "--json"]
    names = [name for name in (*FORMS, *SCALARS) if not asked or name in asked]
    built = {name: {c: build(name, c) for c in CAPABILITIES} for name in names}
    if "--json" in sys.argv:
        print(json.dumps({n: {c: b._asdict() for c, b in row.items()} for n, row in built.items()}))
        return
    print(f"triton {triton.__version__}; registers/spilled bytes/16-byte loads/stores")
    for name, row in built.items():
        cells = [f"{b.registers}/{b.spilled}/{b.wide_loads}/{b.wide_stores}" for b in row.values()]
        print(f"{name:<44}", *(f"{cell:>14}" for cell in cells))


if __name__ == "__main__":
    main()
