"""Clean up a freshly translated ONNX graph, in time linear in its length.

Passes of onnx-ir and onnxscript, but not onnxscript's rewrite rules: one of them (SlicesSplit) is quadratic in the number of
slices and takes ten minutes on a 61-layer model. Weights are never read: only what comes from constants is folded.
"""

from __future__ import annotations

import onnx_ir as ir
import onnx_ir.passes.common as passes
from onnxscript.optimizer import fold_constants

_SMALL = 1024  # elements: shapes, axes and scalars, no weights


def optimise(model: ir.Model) -> None:
    """Fold constants, drop what does nothing, share what is computed twice. In place."""
    fold_constants(model, input_size_limit=_SMALL, output_size_limit=_SMALL, should_fold=_from_constants)
    for one_pass in (
        passes.IdentityEliminationPass(),
        passes.RemoveUnusedNodesPass(),
        passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        _ShareConstants(),
        passes.CommonSubexpressionEliminationPass(),
        passes.RemoveUnusedNodesPass(),
        passes.OutputFixPass(),
        passes.NameFixPass(),
    ):
        one_pass(model)


def _from_constants(node: ir.Node) -> bool | None:
    """False when a weight is involved, None leaves the decision to the pass."""
    weights = (value is not None and isinstance(value.const_value, ir.ExternalTensor) for value in node.inputs)
    return False if any(weights) else None


class _ShareConstants(ir.passes.InPlacePass):
    """One initialiser for all equal small constants. onnx-ir's own pass would read weights to compare them."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        initializers = model.graph.initializers
        first: dict[object, ir.Value] = {}
        before = len(initializers)
        for name, value in list(initializers.items()):
            tensor = value.const_value
            inline = tensor is not None and not isinstance(tensor, ir.ExternalTensor)
            if tensor is None or not inline or tensor.size > _SMALL or value.is_graph_output():
                continue
            kept = first.setdefault((tensor.dtype, tuple(tensor.shape), tensor.tobytes()), value)
            if kept is not value:
                ir.convenience.replace_all_uses_with(value, kept)
                del initializers[name]
        return ir.passes.PassResult(model, modified=len(initializers) != before)
