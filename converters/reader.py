"""Reading an exported program: its fx graph to drafts, node by node, before anything has a name."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node as FxNode

from jquant.ops.elementwise import Constant
from jquant.types import ConversionError, Input, Op

from .aten import BATCH, CONSTANT, EXAMPLES, FOLDED, ROW, TABLE, Call, Unsupported, advice, format_shape, shape_of
from .aten.movement import expanded
from .drafts import (
    Draft,
    Param,
    Refused,
    Results,
    check_value,
    evaluate,
    example_shape,
    integer_constant,
    unchanged,
)
from .exact import DTYPES
from .export import check_plain
from .habits import stub_of
from .keys import key_of_part
from .naming import path_of
from .pixels import join_pixels
from .refusals import listed
from .repeated import OfBatchSize, memory, writes

REMEDY = (
    "Replace them in the model, import the part of the model before them, or add a handler to "
    "jquant_converters.aten.TABLE"
)
_COPIES = {torch.ops.aten.clone.default, torch.ops.aten.lift_fresh_copy.default}
_MAKES_NEW = {
    torch.ops.aten.new_zeros.default,
    torch.ops.aten.new_ones.default,
    torch.ops.aten.new_full.default,
}
_LENDS_DTYPE = {torch.ops.aten.type_as.default: 1, torch.ops.aten.to.other: 1} | dict.fromkeys(_MAKES_NEW, 0)
_CHANGED = "a part of its memory was changed in place; use the out-of-place form"
_MAY_ALIAS = {torch.ops.aten.dropout.default}  # returns its input in eval mode, though the schema says otherwise


class Reader:
    """Turns the fx graph of an exported program into drafts: `drafts` in order, the `inputs` and the `outputs`."""

    def __init__(self, program: Any, dynamic_batch: bool) -> None:
        self.program, self.dynamic_batch = program, dynamic_batch
        self.values: dict[FxNode, Any] = {}  # Draft, Input, Param, Results, Refused, or None: no tensor, or failed
        self.calls: dict[Call, Draft] = {}
        self.given: dict[int, tuple[str, torch.Tensor]] = {}  # parameters and buffers by their memory
        self.roots: dict[FxNode, FxNode] = {}  # the node that made a tensor's memory
        self.changed: dict[FxNode, set[FxNode]] = {}  # {root: readers that saw its last change in place}
        self.drafts: list[Draft] = []
        self.constants: dict[tuple[Param, int], Draft] = {}  # by the version of the tensor, which may change in place
        self.inputs: list[Input] = []
        self.outputs: list[Draft | Input] = []
        self.problems: list[str] = []
        self.folded_params: dict[FxNode, Param] = {}
        self.folded: dict[FxNode, Any] = {}  # what follows from parameters alone; tensors once they are computed
        self.batch = 1  # of the example
        self.sizes = OfBatchSize()

    # -- values

    def read(self) -> None:
        specs = {spec.arg.name: spec for spec in self.program.graph_signature.input_specs if hasattr(spec.arg, "name")}
        for node in self.program.graph.nodes:
            if node.op == "placeholder":
                self.values[node] = self.read_placeholder(node, specs.get(node.name))
            elif node.op == "call_function":
                self.read_call(node)
        if self.problems:
            raise ConversionError(listed("jquant has no operator for", self.problems, REMEDY))
        self.read_outputs()

    def read_placeholder(self, node: FxNode, spec: Any) -> Any:
        kind = spec.kind.name if spec else ""
        if kind in ("PARAMETER", "BUFFER", "CONSTANT_TENSOR"):
            tensor = self.program.state_dict.get(spec.target)
            tensor = self.program.constants.get(spec.target) if tensor is None else tensor
            named = kind != "CONSTANT_TENSOR" or not spec.target.startswith("lifted_tensor_")
            if not isinstance(tensor, torch.Tensor):
                raise ConversionError(f"{spec.target!r} of the program is a {type(tensor).__name__}, not a tensor")
            check_plain(spec.target, tensor)
            node.meta[CONSTANT] = tensor
            self.given.setdefault(tensor.untyped_storage().data_ptr(), (spec.target, tensor))
            return Param(spec.target if named else None, tensor, fixed=kind != "PARAMETER")
        if kind == "USER_INPUT" and isinstance(node.meta.get("val"), torch.Tensor):
            shape, dtype = node.meta["val"].shape, DTYPES[node.meta["val"].dtype]
            if self.dynamic_batch and isinstance(shape[0], int):
                raise ConversionError(
                    f"the batch axis of input {node.name!r} cannot stay symbolic: torch.export fixed it to {shape[0]}; "
                    "use sizes taken from the input or -1 in the model, or pass dynamic_batch=False"
                )
            entry = Input(node.name, tuple(n if isinstance(n, int) else None for n in shape), dtype)
            self.inputs.append(entry)
            if self.dynamic_batch:
                self.batch, self.sizes.symbol = example_shape(shape)[0], shape[0].node.expr
            return entry
        return None

    def read_call(self, node: FxNode) -> None:
        self.values[node] = None
        if not isinstance(node.meta.get("val"), torch.Tensor) and node.target not in TABLE and self.is_symbolic(node):
            self.sizes.read_size(node)
            return
        self.note_folded(node)
        try:
            self.values[node] = self.convert(node)
        except Unsupported as reason:
            if node in self.folded:  # which only matters where it is no weight
                self.values[node] = Refused(f"{node.target}: {reason}" if str(reason) else str(node.target))
                return
            operands = [n for n in node.all_input_nodes if _is_tensor(n)]
            known = node.target in TABLE or _is_getitem(node)
            if known and any(self.values[n] is None for n in node.all_input_nodes if _is_value(n)):
                return  # only because an operand failed, which is listed
            shapes = [format_shape(shape_of(n)) for n in operands]
            where = path_of(node) or "the top level"
            detail = f": {reason}" if str(reason) else ""
            self.problems.append(f"{node.target} at {where} on {', '.join(shapes) or 'no tensors'}{detail}")

    @staticmethod
    def is_symbolic(node: FxNode) -> bool:
        """Arithmetic on sizes, assertions, and parts of a value that failed already."""
        name = getattr(node.target, "__name__", str(node.target))
        ignored = ("_assert", "sym_constrain", "getitem")
        sizes = isinstance(node.meta.get("val"), int | float | torch.SymInt | torch.SymFloat | torch.SymBool)
        return sizes or name.startswith(ignored)

    def convert(self, node: FxNode) -> Any:
        if _is_getitem(node):
            return self.read_item(node)
        target, stub = node.target, stub_of(node)
        if stub is not None:
            return self.read_stub(node, stub)
        if isinstance(target, torch._ops.OpOverload) and writes(node):
            self.check_written(node)
        of_size = self.sizes.run(node, self.fixed_tensor)
        if not of_size and self.is_fixed(node):
            return self.compute(node)
        if target not in TABLE and not of_size:
            raise Unsupported(advice(target, path_of(node)))
        self.view_constant(node)
        schema = target._schema.arguments
        arguments = list(node.args) + [
            node.kwargs.get(a.name, a.default_value if a.has_default_value() else None)
            for a in schema[len(node.args) :]
        ]
        source = arguments[0] if arguments and isinstance(arguments[0], FxNode) else None
        if of_size:
            result = self.repeated(node, arguments)
        else:
            self.check_reads(node)
            if writes(node):
                self.forget(source)
            result = TABLE[target](shape_of(node), *arguments)
        alias = schema[0].alias_info if schema else None
        in_place = alias is not None and alias.is_write and not isinstance(result, FxNode)
        if in_place and not of_size and isinstance(self.values.get(source), Param):
            raise Unsupported("it changes a parameter or buffer in place")
        value = self.value_of(node, result)
        shares = target not in _COPIES and (isinstance(result, FxNode) or alias is not None or target in _MAY_ALIAS)
        self.roots[node] = self.roots.get(source, source) if shares and source is not None else node
        if in_place and source is not None:
            self.values[source] = value  # later reads see the change
            self.changed[self.roots[node]] = {node, source}
            if of_size:
                self.read_again(self.sizes.at[node][0], root=self.roots[node])
        elif shares and source is not None:
            root = self.roots[node]
            if root in self.changed:
                self.changed[root].add(node)
        return value

    def read_stub(self, node: FxNode, stub: Op) -> Any:
        self.check_reads(node)
        self.roots[node] = node
        return self.value_of(node, Call(stub, (node.args[0],)))

    def value_of(self, node: FxNode, result: Any) -> Any:
        if isinstance(result, list):
            return Results(node, result)
        if isinstance(result, Param | Refused):
            return result
        value = self.values[result] if isinstance(result, FxNode) else self.draft(node, result)
        if isinstance(value, Draft):
            check_value(value, node.meta["val"])
        return value

    def read_item(self, node: FxNode) -> Any:
        """One result of a call that has several."""
        source, index = node.args
        results = self.values[source]
        self.roots[node] = self.roots.get(source, node)
        if self.sizes.item(node, source, index) and not isinstance(results, Results):
            return self.value_of(node, self.repeated(node, []))
        if isinstance(results, tuple):
            node.meta[CONSTANT] = results[index].tensor
            return results[index]
        if not isinstance(results, Results):
            raise Unsupported
        if source in self.changed.get(self.roots[node], {source}):
            self.changed.get(self.roots[node], set()).add(node)
        if CONSTANT in source.meta:
            node.meta[CONSTANT] = source.meta[CONSTANT][index]
        found = results.calls[index]
        if isinstance(found, FxNode):
            return self.values[found]
        try:
            if isinstance(found, str):
                raise Unsupported(found)
            value = self.draft(source, found, label=str(index) if index else "")
            check_value(value, node.meta["val"])
        except Unsupported as reason:
            return Refused(f"result {index} of {source.target}: {reason}")
        return value

    # -- constants

    def is_fixed(self, node: FxNode) -> bool:
        """Whether a call depends on no input and on no trained parameter, so that its value is known now."""
        if not isinstance(node.target, torch._ops.OpOverload) or torch.Tag.nondeterministic_seeded in node.target.tags:
            return False
        lender = _LENDS_DTYPE.get(node.target)
        if lender is not None:
            others = [n for n in node.all_input_nodes if n is not node.args[lender]]
            return all(isinstance(n, int) for n in shape_of(node)) and all(self.is_known(n) for n in others)
        return all(self.is_known(n) for n in node.all_input_nodes)

    def fixed_tensor(self, node: FxNode) -> torch.Tensor | None:
        return self.constant_tensor(node) if self.is_known(node) else None

    def repeated(self, node: FxNode, arguments: list[Any]) -> Any:
        """What depends on the number of examples alone: a constant, a row for each of them, or what a handler makes."""
        settled = self.settled(node)
        operands = [n for n in node.all_input_nodes if n in self.sizes.at and _is_tensor(n)]
        if isinstance(settled, Param) or (settled is not None and operands):
            return settled
        refused = [value.reason for n in operands if isinstance(value := self.values[n], Refused)]
        reason = refused[0] if refused else f"{node.target} depends on the number of examples, not with equal rows"
        if node.target in TABLE and not refused:
            try:
                return TABLE[node.target](shape_of(node), *arguments)
            except Unsupported as error:
                reason = f"{node.target}: {error}" if str(error) else reason
        return settled or Refused(reason)

    def settled(self, node: FxNode) -> Param | Call | None:
        """The same for every number of examples, or a row for each of them. Handlers see which in `meta`."""
        found, row = self.sizes.constant(node), self.sizes.row(node)
        node.meta.pop(ROW, None)
        node.meta.pop(CONSTANT, None)
        node.meta.pop(EXAMPLES, None)
        if self.sizes.counts(node):
            node.meta[EXAMPLES] = True
        if found is not None:
            node.meta[CONSTANT] = found
            return Param(None, found)
        if row is None:
            return None
        node.meta[ROW] = row
        return expanded(shape_of(node), Param(None, row), like_batch=True)

    def read_again(self, written: torch.Tensor, root: FxNode | None = None) -> None:
        """Every value that lies in memory that was written: both sizes of it know what became of it."""
        for node in self.sizes.sharing(written):
            if _is_tensor(node):
                self.values[node] = self.value_of(node, self.settled(node) or Refused(_CHANGED))
                if root is not None:
                    self.changed[root].add(node)

    def forget(self, written: Any) -> None:
        """What lies in memory that an input is written into follows from the number of examples no longer."""
        for node in self.sizes.sharing(self.sizes.at[written][0]) if written in self.sizes.at else ():
            del self.sizes.at[node]
            node.meta.pop(ROW, None)
            node.meta.pop(CONSTANT, None)
            if node is not written:
                self.values[node] = Refused(_CHANGED)

    def is_known(self, node: FxNode) -> bool:
        found = self.values.get(node)
        return isinstance(found, Param) and found.fixed

    def compute(self, node: FxNode) -> Any:
        """The value of a call that does not depend on the inputs. Tensors that the code made are changed in place."""
        result = self.run(node)
        if writes(node):
            self.read_again(self.constant_tensor(node.args[0]))
        if isinstance(result, torch.Tensor):
            node.meta[CONSTANT] = result
            return Param(None, result)
        return tuple(Param(None, part) for part in result)

    def check_written(self, node: FxNode) -> None:
        source = node.args[0]
        if not isinstance(source, FxNode):
            return
        tensor = self.sizes.at[source][0] if source in self.sizes.at else self.fixed_tensor(source)
        if memory(tensor) & self.given.keys():
            raise Unsupported("it changes a parameter or buffer in place")

    def constant_tensor(self, node: Any) -> torch.Tensor:
        tensor: torch.Tensor = node.meta[CONSTANT]
        return tensor

    def run(self, node: FxNode) -> Any:
        arguments = (node.args, dict(node.kwargs))
        lender = _LENDS_DTYPE.get(node.target)
        if lender is not None:  # of which only the dtype counts
            given = list(node.args)
            given[lender] = torch.empty(0, dtype=node.args[lender].meta["val"].dtype)
            arguments = (tuple(given), dict(node.kwargs))
        args, kwargs = torch.fx.map_arg(arguments, self.constant_tensor)
        with torch.no_grad():
            try:
                return node.target(*args, **kwargs)
            except (RuntimeError, TypeError, ValueError, IndexError) as error:
                raise Unsupported(f"it cannot be computed at the import: {error}") from error

    def view_constant(self, node: FxNode) -> None:
        """Keeps what is only a view of parameters: as a weight it needs no operator."""
        inputs = node.all_input_nodes
        alias = node.target._schema.arguments[0].alias_info if node.target._schema.arguments else None
        if inputs and alias is not None and not alias.is_write and all(CONSTANT in n.meta for n in inputs):
            node.meta[CONSTANT] = self.run(node)

    def read_param(self, node: FxNode, role: str) -> Param:
        value = self.values[node]
        if isinstance(value, Param):
            return value
        if value is not None and CONSTANT in node.meta:
            part = node.meta[CONSTANT]
            source = self.given.get(part.untyped_storage().data_ptr())
            return Param(key_of_part(*source, part) if source else None, part.clone())
        if node in self.folded:
            return self.folded_param(node)
        raise Unsupported(f"its {role} is computed from the inputs; it must follow from parameters alone")

    # -- what follows from parameters alone: as a weight it is computed now

    def note_folded(self, node: FxNode) -> None:
        sources = node.all_input_nodes
        if isinstance(node.target, torch._ops.OpOverload) and writes(node) and node.args[0] in self.folded:
            for known in self.folded:  # one of them may share the memory that changes
                known.meta.pop(FOLDED, None)
            self.folded.clear()
        elif sources and self.is_function(node) and all(self.is_of_parameters(n) for n in sources):
            node.meta[FOLDED] = True
            self.folded[node] = None

    @staticmethod
    def is_function(node: FxNode) -> bool:
        """Whether a call has one result for its operands, and changes nothing."""
        if not isinstance(node.target, torch._ops.OpOverload):
            return _is_getitem(node)
        return torch.Tag.nondeterministic_seeded not in node.target.tags and not writes(node)

    def is_of_parameters(self, node: FxNode) -> bool:
        return node in self.folded or isinstance(self.values.get(node), Param)

    def folded_param(self, node: FxNode) -> Param:
        tensor = self.folded_tensor(node)
        found = self.folded_params.get(node)
        if found is None:
            found = self.folded_params[node] = Param(None, tensor)
        return found

    def folded_tensor(self, node: FxNode) -> Any:
        value = self.values.get(node)
        if isinstance(value, Param):
            return value.tensor
        if self.folded[node] is None:
            args, kwargs = torch.fx.map_arg((node.args, dict(node.kwargs)), self.folded_tensor)
            with torch.no_grad():
                try:
                    self.folded[node] = node.target(*args, **kwargs)
                except (RuntimeError, TypeError, ValueError, IndexError) as error:
                    raise Unsupported(f"{node.target} cannot be computed at the import: {error}") from error
        return self.folded[node]

    # -- drafts

    def check_reads(self, node: FxNode) -> None:
        if any(self.is_stale(operand) for operand in node.all_input_nodes):
            raise Unsupported("it reads a tensor whose view was changed in place; use the out-of-place form")

    def is_stale(self, node: FxNode) -> bool:
        """Whether the memory of a tensor was changed through another name: jquant's values do not share memory."""
        fresh = self.changed.get(self.roots.get(node, node))
        return fresh is not None and node not in fresh

    def draft(self, node: FxNode, call: Call, label: str | None = None) -> Draft:
        if call in self.calls:
            return self.calls[call]
        result = Draft(call.op, node, label=call.label if label is None else label)
        names = [a.name for a in node.target._schema.arguments]
        many = isinstance(node.args[0], list | tuple) if node.args else True
        roles = [f"{names[0]}_{i}" if many or i >= len(names) else names[i] for i in range(len(call.operands))]
        result.operands = tuple(
            self.operand(node, result, value, role) for value, role in zip(call.operands, roles, strict=True)
        )
        for role, parameter in call.params.items():
            if parameter is not None:
                result.params[role] = self.read_param(parameter, role)
        join_pixels(result)
        result.value = evaluate(result, self.batch)
        self.calls[call] = unchanged(result) or result
        if self.calls[call] is result:
            self.drafts.append(result)
        return self.calls[call]

    def operand(self, node: FxNode, reader: Draft, value: Any, role: str) -> Any:
        if isinstance(value, Call):
            return self.draft(node, value, value.label or type(value.op).__name__.lower())
        if value is BATCH:
            if not self.dynamic_batch:
                raise Unsupported("it needs the batch, which is fixed")
            return self.inputs[0]
        if isinstance(value, Param):
            return self.constant(node, reader, value, role)
        if isinstance(value, FxNode):
            if not _is_tensor(value):
                raise Unsupported("it computes with the batch size; make it a constant")
            found = self.values[value]
            if isinstance(found, Refused) and value in self.folded:
                found = self.folded_param(value)
            if found is None or isinstance(found, Refused):
                raise Unsupported(found.reason if found else "")
            return self.constant(node, reader, found, role) if isinstance(found, Param) else found
        if not isinstance(value, int | float):
            raise Unsupported(f"operand {value!r} is not a tensor or a number")
        return self.constant(node, reader, Param(None, torch.tensor(float(value))), role)

    def constant(self, node: FxNode, reader: Draft | None, parameter: Param, role: str) -> Draft:
        at = parameter, parameter.tensor._version
        found = self.constants.get(at)
        if found is None:
            found = Draft(Constant(), node, constant=parameter, constant_of=(reader, role))
            if parameter.tensor.dtype.is_floating_point:
                if parameter.key is None:  # a later change in place is another constant
                    found.constant = parameter = Param(None, parameter.tensor.clone())
                found.params["value"] = parameter
            else:
                found.op = integer_constant(parameter.tensor)
            found.value = evaluate(found, self.batch)
            self.constants[at] = found
            self.drafts.append(found)
        return found

    def read_outputs(self) -> None:
        output = next(n for n in self.program.graph.nodes if n.op == "output")
        specs = self.program.graph_signature.output_specs
        for i, (spec, node) in enumerate(zip(specs, output.args[0], strict=True)):
            if spec.kind.name == "USER_INPUT_MUTATION":
                continue
            if spec.kind.name != "USER_OUTPUT":
                raise ConversionError(f"the model writes {spec.target!r} in its forward; a graph has no state")
            if node is None:
                continue  # `naming` puts it into the structure of the result
            if not _is_tensor(node):
                raise ConversionError(f"output {i} is {node!r}, not a tensor; return tensors and None only")
            value = self.values[node]
            if isinstance(value, Refused):
                raise ConversionError(f"output {i} is {value.reason}")
            if self.is_stale(node):
                raise ConversionError(
                    f"output {i} is a tensor whose view was changed in place; use the out-of-place form"
                )
            self.outputs.append(self.constant(node, None, value, "value") if isinstance(value, Param) else value)
        if not self.outputs:
            raise ConversionError("the model returns no tensor")


def _is_getitem(node: FxNode) -> bool:
    return getattr(node.target, "__name__", "") == "getitem"


def _is_tensor(node: Any) -> bool:
    return isinstance(node, FxNode) and isinstance(node.meta.get("val"), torch.Tensor)


def _is_value(node: FxNode) -> bool:
    """Whether an fx node stands for a tensor or several, and not for a size."""
    return isinstance(node.meta.get("val"), torch.Tensor | list | tuple)
