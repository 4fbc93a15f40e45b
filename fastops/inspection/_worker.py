"""Compiles kernels in a process of its own: reads one JSON task a line, answers one JSON line.

Triton decides at its import whether `@triton.jit` interprets; a process that interprets cannot compile. A compiler that
crashes takes only this process with it.
"""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import os
import re
import select
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

from fastops.inspection import _source, sass
from fastops.inspection.gpus import RESERVED_SHARED_BYTES
from fastops.inspection.report import LABELS, KernelReport

IDLE_SECONDS = 60.0
_WARNING = re.compile(r"^.*\(C7\d{3}\).*$", re.MULTILINE)
_SPILLS = re.compile(r"(\d+) bytes spill (?:stores|loads)")
_BARRIERS = re.compile(r"used (\d+) barriers")
_BLOCK = re.compile(r"^\.reqntid (\d+)", re.MULTILINE)


def main() -> None:
    """Serve tasks until the input ends or none has come for a while."""
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever the compiler prints must not end up between the answers
    # whoever started us may live for days after its last kernel
    while select.select([sys.stdin], [], [], IDLE_SECONDS)[0]:
        line = sys.stdin.readline()
        if not line:
            return
        print(json.dumps(serve(json.loads(line))), file=replies, flush=True)


def serve(task: dict[str, Any]) -> dict[str, Any]:
    """Compile one task; errors of the kernel are part of the report, errors of ours are `failed`."""
    try:
        kernel = jit_function(_source.find(task["kernel"]))
        constexprs = {name: _source.decode(value) for name, value in task["constexprs"].items()}
        digest = _source.digest(kernel, constexprs)
    except Exception as error:
        return {"failed": f"{type(error).__name__}: {error}"}
    import triton

    identity = {name: task[name] for name in (*LABELS, "target", "num_stages")}
    try:
        report = compile_task(task, kernel, constexprs, identity | {"triton": triton.__version__})
    except Exception as error:
        report = KernelReport(**identity, triton=triton.__version__, error=explain(error))
    return {"digest": digest, "report": report.to_json()}


def explain(error: BaseException) -> str:
    """The compiler's own words, with the cause that Triton chains below its "CompilationError at 12:3"."""
    parts: list[str] = []
    current: BaseException | None = error
    while current is not None and len(parts) < 4:
        text = str(current).strip()
        if text and not any(text in part for part in parts):
            parts.append(f"{type(current).__name__}: {text}")
        current = current.__cause__
    return "\n".join(parts) or type(error).__name__


def compile_task(
    task: dict[str, Any], kernel: Any, constexprs: dict[str, Any], identity: dict[str, Any]
) -> KernelReport:
    """Compile, disassemble, count; write SASS and PTX next to the path the task names."""
    import triton
    from triton import knobs
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = kernel.arg_names
    signature = {name: task["signature"].get(name, "constexpr") for name in names}
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in task["divisible_by_16"]}
    source = ASTSource(kernel, signature=signature, constexprs=constexprs, attrs=attributes)
    options = {"num_warps": task["num_warps"], "num_stages": task["num_stages"], **task["options"]}
    knobs.nvidia.dump_ptxas_log = True
    log = io.StringIO()
    with contextlib.redirect_stdout(log):
        compiled = triton.compile(source, target=GPUTarget("cuda", task["target"], 32), options=options)
    ptx = compiled.asm["ptx"]
    listing = disassemble(compiled.asm["cubin"])
    for kind, text in (("sass", listing), ("ptx", ptx)):
        Path(f"{task['artifacts']}.{kind}.gz").write_bytes(gzip.compress(text.encode(), 5))

    registers, stack, static_shared = sass.resources(listing)
    if task["target"] >= 90:  # cuobjdump counts what the driver reserves as the kernel's
        static_shared -= RESERVED_SHARED_BYTES
    functions = sass.parse(listing)
    instructions = Counter(instruction.root for function in functions for instruction in function)
    loops = tuple(loop for function in functions for loop in sass.loops(function))
    threads = _BLOCK.search(ptx)
    return KernelReport(
        **identity,
        registers=registers,
        stack_bytes=stack,
        local_loads=instructions["LDL"],
        local_stores=instructions["STL"],
        shared_bytes=compiled.metadata.shared + max(0, static_shared),
        num_warps=int(threads.group(1)) // 32 if threads else compiled.metadata.num_warps,
        num_ctas=getattr(compiled.metadata, "num_ctas", 1),
        spill_bytes=sum(int(count) for count in _SPILLS.findall(log.getvalue())),
        barriers=sum(int(count) for count in _BARRIERS.findall(log.getvalue())),
        tensor_memory_columns=getattr(compiled.metadata, "tmem_size", 0) or 0,
        instructions=instructions,
        loops=loops,
        main_loop=sass.main_loop(loops),
        tensor_core=sass.tensor_core(instructions),
        async_copies=sass.async_copies(instructions),
        warnings=tuple(dict.fromkeys(line.strip() for line in _WARNING.findall(log.getvalue()))),
        artifacts=task["artifacts"],
    )


def disassemble(cubin: bytes) -> str:
    """Resource usage and machine code as text."""
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        # cuobjdump runs the nvdisasm it finds on the PATH
        tools = os.path.dirname(knobs.nvidia.nvdisasm.path)
        path = os.pathsep.join([tools, os.environ.get("PATH", "")])
        done = subprocess.run(
            [knobs.nvidia.cuobjdump.path, "-res-usage", "-sass", file.name],
            capture_output=True,
            text=True,
            env={**os.environ, "PATH": path},
        )
    if done.returncode:
        raise RuntimeError(f"cuobjdump failed: {done.stderr.strip()}")
    return done.stdout


def jit_function(kernel: Any) -> Any:
    """The kernel without autotune and heuristics around it."""
    from triton.runtime.jit import JITFunction

    while not isinstance(kernel, JITFunction):
        kernel = kernel.fn
    return kernel


if __name__ == "__main__":
    main()
