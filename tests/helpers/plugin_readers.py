"""The fields of a TensorRT plugin read back, as its C++ reads them: inverse of `write_op` and `write_bundle`."""

from __future__ import annotations

import re
import struct
from collections.abc import Mapping

from mla2dsa.errors import UserError
from mla2dsa.kernels.gpu.binaries.bundle import MAGIC, BundledBinary, BundledKernel
from mla2dsa.kernels.gpu.binaries.bundle import VERSION as BUNDLE_VERSION
from mla2dsa.kernels.gpu.programs.expression_text import read_expression, write_expression
from mla2dsa.kernels.gpu.programs.op_program import Form, OpProgram, Rule
from mla2dsa.kernels.gpu.programs.plugin_text import ANY, VERSION, check_limits
from mla2dsa.kernels.gpu.programs.program import Expr, Variant
from mla2dsa.kernels.gpu.programs.program_text import ProgramReader

_CUDA_ELF, _MACHINE_AT = 190, 18  # e_machine of a cubin, and where an ELF header has it


def read_op(text: str, kernels: Mapping[str, Variant]) -> OpProgram:
    """Inverse of `write_op`; kernels: variant by the name in the text. Raises UserError with the line's number."""
    check_limits(text)
    reader = _OpReader(kernels)
    rows = enumerate(text.removesuffix("\n").split("\n"), 1)
    number, line = next(rows)
    if line != f"mla2dsa-plugin {VERSION}":
        raise UserError(f"line {number}: expected 'mla2dsa-plugin {VERSION}', the version that is known here")
    for number, line in rows:
        try:
            reader.line(line.split(" "))
        except UserError as error:
            raise UserError(f"line {number}: {error}") from None
    return reader.op()


class _OpReader:
    def __init__(self, kernels: Mapping[str, Variant]) -> None:
        self._kernels = kernels
        self._op = ""
        self._inputs: list[tuple[str, tuple[Rule, ...]]] = []
        self._outputs: list[tuple[str, tuple[Expr, ...]]] = []
        self._aliases: list[tuple[int, int]] = []
        self._forms: list[Form] = []
        self._open: tuple[str, tuple[int, ...], Expr] | None = None
        self._body = ProgramReader(kernels)
        self._loops = False  # whether the next `end` is that of a `repeat`

    def line(self, words: list[str]) -> None:
        if self._open is not None:
            self._inside(self._open, words)
            return
        match words:
            case ["op", name] if not self._op:
                self._op = name
            case ["in", kind, *rules] if not self._outputs:
                self._inputs.append((kind, tuple(None if it == ANY else read_expression(it) for it in rules)))
            case ["out", kind, *dims]:
                self._outputs.append((kind, tuple(map(read_expression, dims))))
            case ["alias", output, source] if output.isdecimal() and source.isdecimal():
                self._aliases.append((int(output), int(source)))
            case ["form", name, sms, guard] if re.fullmatch(r"\d+(,\d+)*", sms, re.ASCII):
                self._open = (name, tuple(map(int, sms.split(","))), read_expression(guard))
                self._body = self._fresh()
            case _:
                raise UserError(f"{' '.join(words)!r} is not known here")

    def op(self) -> OpProgram:
        if not self._forms or self._open is not None:
            raise UserError("the program has no form" if self._open is None else "form without end")
        return OpProgram(self._op, tuple(self._inputs), tuple(self._outputs), tuple(self._aliases), tuple(self._forms))

    def _inside(self, form: tuple[str, tuple[int, ...], Expr], words: list[str]) -> None:
        if words == ["end"] and not self._loops:
            self._forms.append(Form(*form, self._body.program()))
            self._open = None
        elif words[0] in ("in", "out", "alias"):
            raise UserError(f"{' '.join(words)!r} is not known inside of a form")
        else:
            self._body.line(words)
            self._loops = words[0] == "repeat" or (self._loops and words != ["end"])

    def _fresh(self) -> ProgramReader:
        """A reader that knows inputs and outputs: those of the op are those of each form's program."""
        body = ProgramReader(self._kernels)
        for kind, _ in self._inputs:
            body.line(["in", kind])
        for kind, dims in self._outputs:
            body.line(["out", kind, *map(write_expression, dims)])
        for output, source in self._aliases:
            body.line(["alias", str(output), str(source)])
        return body


def read_bundle(data: bytes) -> dict[str, BundledKernel]:
    """Inverse of `write_bundle`; one NUL may follow. Raises UserError if it is not whole."""
    reader = _BundleReader(data)
    if reader.take(len(MAGIC)) != MAGIC or reader.number() != BUNDLE_VERSION:
        raise UserError(f"the kernels are not a bundle of version {BUNDLE_VERSION}")
    size = reader.number()
    if size not in (len(data), len(data) - 1) or (size < len(data) and data[size]):
        raise UserError(f"the bundle of kernels has {len(data)} bytes, expected {size}")
    kernels = dict(reader.kernel() for _ in range(reader.number()))
    if reader.at != size:
        raise UserError(f"the bundle of kernels ends at byte {reader.at}, expected {size}")
    return kernels


class _BundleReader:
    def __init__(self, data: bytes) -> None:
        self._data = data
        self.at = 0

    def take(self, count: int) -> bytes:
        if count > len(self._data) - self.at:
            raise UserError(f"the bundle of kernels is cut off at byte {len(self._data)}")
        self.at += count
        return self._data[self.at - count : self.at]

    def number(self) -> int:
        (value,) = struct.unpack("<I", self.take(4))
        return int(value)

    def text(self) -> str:
        return self.take(self.number()).decode("ascii", errors="replace")

    def kernel(self) -> tuple[str, BundledKernel]:
        name, parameters = self.text(), self.text()
        aligned = tuple(self.number() for _ in range(self.number()))
        binaries = dict(self._binary(name) for _ in range(self.number()))
        if set(parameters) - set("pilfn") or any(number >= len(parameters) for number in aligned):
            raise UserError(f"kernel {name}: parameters {parameters!r} with {aligned} aligned are not known here")
        return name, BundledKernel(parameters, aligned, binaries)

    def _binary(self, kernel: str) -> tuple[int, BundledBinary]:
        sm, threads, shared = self.number(), self.number(), self.number()
        entry, cubin = self.text(), self.take(self.number())
        machine = cubin[_MACHINE_AT : _MACHINE_AT + 2]
        if cubin[:4] != b"\x7fELF" or machine != struct.pack("<H", _CUDA_ELF):
            raise UserError(f"kernel {kernel} for sm_{sm}: not a cubin")
        return sm, BundledBinary(threads, shared, entry, cubin)
