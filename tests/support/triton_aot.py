"""Compiles a kernel with no device and reads what came out: registers, memory, and the instructions."""

import os
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

_SCALARS = {"residual": "fp32", "attention": "fp32", "scale": "fp32", "lse_scale": "fp32"}
_POINTERS = {
    "maps_ptr": "*i64", "grads_ptr": "*i64", "queries_ptr": "*i64", "keys_ptr": "*i64", "lse_table_ptr": "*i64",
    "handed_on_ptr": "*i64", "bias_ptr": "*i64",
    "lengths_ptr": "*i64", "key_valid_ptr": "*u8", "dead_ptr": "*u8", "ready_ptr": "*i32", "ticket_ptr": "*i32",
}  # fmt: skip
# What one multiprocessor has, by compute capability: threads, KiB of shared memory; registers are 64 Ki on each.
_THREADS = {80: 2048, 89: 1536, 90: 2048, 100: 2048, 120: 1536}
_SHARED = {80: 164, 89: 100, 90: 228, 100: 228, 120: 100}
TENSOR_COLUMNS = 512  # of tensor memory, on sm_100


@dataclass
class Compiled:
    """One compiled kernel.

    Attributes:
        registers, stack, local: as `cuobjdump -res-usage` gives them; -1 where there is no tool.
        shared, tensor_columns: bytes of shared memory and columns of tensor memory, as the launch asks for them.
        warps: of one program.
        capability: what it was compiled for.
        sass, ptx, ttgir, ttir: the listing, and what it was made from, step by step.
    """

    registers: int = -1
    stack: int = -1
    shared: int = -1
    local: int = -1
    tensor_columns: int = 0
    warps: int = 0
    capability: int = 0
    sass: str = ""
    ptx: str = ""
    ttgir: str = ""
    ttir: str = ""

    @property
    def spills(self) -> bool:
        """Whether any value lives in local memory: a stack, or an instruction that reads or writes it."""
        return self.stack > 0 or self.local > 0 or self.count(r"\bLDL|\bSTL") > 0

    @property
    def resident_warps(self) -> int:
        """Warps that one multiprocessor holds at once: registers go to a warp in pieces of 256, from its quarter of
        them; a program takes 1 KiB of shared memory beside its own."""
        quarter = 16384 // (-(-self.registers * 32 // 256) * 256)
        programs = min(
            4 * quarter // self.warps,
            _THREADS[self.capability] // (32 * self.warps),
            _SHARED[self.capability] * 1024 // (self.shared + 1024),
            TENSOR_COLUMNS // max(1, self.tensor_columns),
        )
        return programs * self.warps

    @property
    def wide_loads(self) -> int:
        """Loads of 16 bytes a thread, to registers or to shared memory."""
        return self.count(r"(LDG|LDGSTS)[.A-Z0-9]*\.128")

    def summed(self, dtype: str) -> list[int]:
        """How many numbers of one type each reduction takes together."""
        found = []
        for each in self.ttgir.split('"tt.reduce"')[1:]:
            axis, result = re.search(r"axis = (\d)", each), re.search(r"\}\) : \(tensor<([0-9x]+)x(\w+)", each)
            if axis and result and result[2] == dtype:
                found.append(int(result[1].split("x")[int(axis[1])]))
        return found

    def inner_loop(self, containing: str) -> str:
        """The shortest loop of the listing with an instruction that matches, from its label to its branch back."""
        lines = self.sass.splitlines()
        labels = {m[1]: i for i, line in enumerate(lines) if (m := re.match(r"\s*(\.L_\w+):", line))}
        found = []
        for end, line in enumerate(lines):
            branch = re.search(r"BRA[^`]*`\((\.L_\w+)\)", line)
            if branch and labels.get(branch[1], end) < end:
                body = "\n".join(lines[labels[branch[1]] : end + 1])
                if re.search(containing, body):
                    found.append(body)
        return min(found, key=len, default="")

    def count(self, pattern: str) -> int:
        """How many instructions match a regular expression."""
        return len(re.findall(pattern, self.sass))


@cache
def tool(name: str) -> str | None:
    """The path of cuobjdump or nvdisasm: Triton's own, or one on PATH."""
    own = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return str(own) if own.is_file() and os.access(own, os.X_OK) else shutil.which(name)


def compile_kernel(kernel: Any, constants: dict[str, Any], capability: int, options: dict[str, Any]) -> Compiled:
    """Compiles `kernel` for sm_`capability` with a launch's options, pointers aligned to 16 bytes."""
    target = GPUTarget("cuda", capability, 32)
    found = _read(triton.compile(_source(kernel, constants), target=target, options=options))
    found.warps, found.capability = options["num_warps"], capability
    return found


def compile_amd(kernel: Any, constants: dict[str, Any], num_warps: int) -> int:
    """Compiles for gfx942; the size of the code object."""
    target = GPUTarget("hip", "gfx942", 64)
    built = triton.compile(_source(kernel, constants), target=target, options={"num_warps": num_warps})
    return len(built.asm["hsaco"])


def _source(kernel: Any, constants: dict[str, Any]) -> ASTSource:
    signature, values, attrs = {}, {}, {}
    for index, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
            values[(index,)] = constants[name]
        elif name.endswith("_ptr"):
            rows = name == "start_ptr" and constants.get("ONE_HOT")
            signature[name] = "*i64" if rows else _POINTERS.get(name, "*fp32")
            attrs[(index,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = _SCALARS.get(name, "i32")
    return ASTSource(fn=kernel, signature=signature, constexprs=values, attrs=attrs)


def _read(built: Any) -> Compiled:
    columns = getattr(built.metadata, "tmem_size", None) or 0
    found = Compiled(shared=built.metadata.shared, tensor_columns=columns)
    found.ttir, found.ttgir, found.ptx = (str(built.asm[name]) for name in ("ttir", "ttgir", "ptx"))
    cuobjdump, nvdisasm = tool("cuobjdump"), tool("nvdisasm")
    if cuobjdump is None or nvdisasm is None:
        return found
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(built.asm["cubin"])
        file.flush()
        usage = subprocess.run([cuobjdump, "-res-usage", file.name], capture_output=True, text=True, check=True)
        listing = subprocess.run([nvdisasm, "-c", file.name], capture_output=True, text=True, check=True)
    fields = dict(re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", usage.stdout + usage.stderr))
    found.registers, found.stack = int(fields["REG"]), int(fields["STACK"])
    found.local = int(fields["LOCAL"])
    found.sass = listing.stdout
    return found
