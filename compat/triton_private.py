"""What we use of Triton without its promise. Each function raises `MovedError` when this Triton does not have the name any more.

Triton is imported inside of the functions: a machine without it has no GPU kernels, but everything else.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

from .private_names import Library

_INTERPRETER = "triton.runtime.interpreter:"
_TO_PTX = ("ttir", "ttgir", "llir", "ptx")  # Triton's stages

TRITON = Library(
    "triton",
    ">=3.6,<3.10",
    names={
        "triton._C.libtriton:ir.context": "kernels are compiled without a driver",
        "triton._C.libtriton:ir.load_dialects": "kernels are compiled without a driver",
        "triton.backends.compiler:GPUTarget": "kernels are compiled for GPUs that are not here",
        "triton.compiler:ASTSource": "kernels are compiled without being launched",
        "triton.compiler:make_backend": "kernels are compiled without a driver",
        "triton.knobs:compilation.disable_line_info": "binaries name no file of this machine",
        "triton.knobs:compilation.scope": "settings are put back",
        "triton.language:core.tensor_descriptor_base": "what kernels are written in is swapped for the interpreter's",
        "triton.language:standard": "what kernels are written in is swapped for the interpreter's",
        "triton.language:str_to_ty": "types by name",
        "triton.runtime.jit:JITFunction": "what @triton.jit makes",
        "triton.runtime.jit:type_canonicalisation_dict": "Triton's names of torch's dtypes",
        f"{_INTERPRETER}InterpretedFunction": "a kernel that runs on the CPU",
        f"{_INTERPRETER}InterpreterBuilder": "operations on numpy arrays",
        f"{_INTERPRETER}ReduceOps": "tl.reduce on numpy arrays",
        f"{_INTERPRETER}ScanOps": "tl.associative_scan on numpy arrays",
        f"{_INTERPRETER}TensorHandle": "a numpy array with a Triton type",
        f"{_INTERPRETER}TritonSemantic": "what kernels are written in, on a builder",
        f"{_INTERPRETER}_get_np_dtype": "the numpy type that holds a Triton type",
        f"{_INTERPRETER}_ir.INPUT_PRECISION.TF32": "how a product rounds its operands",
        f"{_INTERPRETER}_ir.ROUNDING_MODE.RTZ": "how a conversion rounds",
        f"{_INTERPRETER}_patch_lang": "what kernels are written in is swapped for the interpreter's",
        f"{_INTERPRETER}interpreter_builder": "which builder an interpreted kernel uses",
        f"{_INTERPRETER}interpreter_semantic": "which builder an interpreted kernel uses",
    },
    attributes={
        "CUDABackend.add_stages": "Triton's stages are run one by one",
        "CUDABackend.get_codegen_implementation": "Triton's stages are run one by one",
        "CUDABackend.get_module_map": "Triton's stages are run one by one",
        "CUDABackend.load_dialects": "Triton's stages are run one by one",
        "CUDABackend.parse_options": "Triton's stages are run one by one",
        "JITFunction.arg_names": "the parameters of a kernel",
        "JITFunction.fn": "the Python function of a kernel",
    },
)


def python_function(kernel: Any) -> Any:
    """What @triton.jit decorated."""
    return TRITON.get(kernel, "JITFunction.fn")


def parameters(kernel: Any) -> list[str]:
    """Names of a kernel's parameters, constants included, in order."""
    names: list[str] = list(TRITON.get(kernel, "JITFunction.arg_names"))
    return names


def is_jit(value: Any) -> bool:
    """Whether @triton.jit made this in a process that compiles; a Gluon kernel is not."""
    return type(value) is TRITON.find("triton.runtime.jit:JITFunction")


def bundled_assemblers() -> Path:
    """The folder of the ptxas that Triton brings; it need not exist."""
    import triton

    return Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass(frozen=True)
class Interpreter:
    """Triton's interpreter.

    module: it holds the builder and the classes in use. Function, Builder, Reduce, Scan, Handle, Semantic: classes to derive
    from. numpy_type(triton type): what holds it. truncates, tf32: a rounding mode, an input precision.
    """

    module: ModuleType
    Function: Any
    Builder: Any
    Reduce: Any
    Scan: Any
    Handle: Any
    Semantic: Any
    numpy_type: Callable[[Any], Any]
    truncates: Any
    tf32: Any

    def use(self, builder: Any, reduce: Any, scan: Any) -> Any:
        """Interpreted kernels use these; returns the semantic that rewritten functions look up. Nothing is put back."""
        for name in ("interpreter_builder", "interpreter_semantic"):
            TRITON.find(_INTERPRETER + name)
        stock: Any = self.module
        stock.interpreter_builder, stock.ReduceOps, stock.ScanOps = builder, reduce, scan
        stock.interpreter_semantic = self.Semantic(builder)
        return stock.interpreter_semantic

    def patch_language(self) -> None:
        """triton.language becomes the interpreter's. Nothing is put back."""
        import triton.language as tl

        seen = {
            "tl": tl,
            "core": tl.core,
        }  # what Triton patches is what a kernel's globals show
        TRITON.find(_INTERPRETER + "_patch_lang")(FunctionType((lambda: None).__code__, seen))


def interpreter() -> Interpreter:
    """Triton's interpreter, all names of it looked up."""

    def named(name: str) -> Any:
        return TRITON.find(_INTERPRETER + name)

    return Interpreter(
        module=importlib.import_module(_INTERPRETER.rstrip(":")),
        Function=named("InterpretedFunction"),
        Builder=named("InterpreterBuilder"),
        Reduce=named("ReduceOps"),
        Scan=named("ScanOps"),
        Handle=named("TensorHandle"),
        Semantic=named("TritonSemantic"),
        numpy_type=named("_get_np_dtype"),
        truncates=named("_ir.ROUNDING_MODE.RTZ"),
        tf32=named("_ir.INPUT_PRECISION.TF32"),
    )


def type_named(name: str) -> Any:
    """The Triton type called "*bf16", "i32", ..."""
    return TRITON.find("triton.language:str_to_ty")(name, None)


def name_of_dtype(dtype: Any) -> str:
    """Triton's name of a torch dtype: "bf16"."""
    name: str = TRITON.find("triton.runtime.jit:type_canonicalisation_dict")[str(dtype).removeprefix("torch.")]
    return name


def language_parts() -> list[Any]:
    """The modules and classes of triton.language that the interpreter changes, triton.language first."""
    import triton.language as tl

    inner = (TRITON.find(f"triton.language:{name}") for name in ("standard", "core.tensor_descriptor_base"))
    own = [tl, tl.core, tl.math, *inner, tl.tensor, tl.dtype]
    return [*own, *([tl.condition] if hasattr(tl, "condition") else [])]  # from Triton 3.7 on


def _context() -> Any:
    """What holds the compiler's intermediate code, with Triton's own dialects."""
    context = TRITON.find("triton._C.libtriton:ir.context")()
    TRITON.find("triton._C.libtriton:ir.load_dialects")(context)
    return context


def to_ptx(
    kernel: Any,
    sm: int,
    options: Mapping[str, Any],
    types: Mapping[str, str],
    constants: Mapping[str, Any],
    aligned: frozenset[str],
) -> tuple[str, dict[str, Any]]:
    """(PTX, what Triton says of it) for an NVIDIA GPU that need not be here; nothing is written to Triton's cache.

    types: of the arguments by name, in order. aligned: arguments that are multiples of 16. Raises what the compiler raises.
    """
    from triton import knobs

    def of_backend(name: str) -> Any:
        return TRITON.get(backend, f"CUDABackend.{name}")

    target = TRITON.find("triton.backends.compiler:GPUTarget")("cuda", sm, 32)
    backend = TRITON.find("triton.compiler:make_backend")(target)
    parsed = of_backend("parse_options")(dict(options))
    names = parameters(kernel)
    source = TRITON.find("triton.compiler:ASTSource")(
        fn=kernel,
        signature=dict.fromkeys(names, "constexpr") | dict(types),
        constexprs=dict(constants),
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in sorted(aligned)},
    )
    context = _context()
    of_backend("load_dialects")(context)
    metadata: dict[str, Any] = dict(parsed.__dict__)
    stages: dict[str, Any] = {}
    with TRITON.find("triton.knobs:compilation.scope")():
        TRITON.find("triton.knobs:compilation.disable_line_info")
        knobs.compilation.disable_line_info = True  # a cubin is a third of the size
        of_backend("add_stages")(stages, parsed, source.language)
        codegen, modules = of_backend("get_codegen_implementation")(parsed), of_backend("get_module_map")()
        module = source.make_ir(target, parsed, codegen, modules, context)
        for stage in _TO_PTX:
            module = stages[stage](module, metadata)
    return str(module), metadata
