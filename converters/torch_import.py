"""`from_torch`: an nn.Module to a Graph and its params, through an undecomposed `torch.export`."""

from __future__ import annotations

import traceback
import warnings
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import torch
from torch.fx import Node as FxNode
from torch.utils import _pytree as pytree

from jquant.ir.graph import validate
from jquant.ir.passes import prune
from jquant.ops.elementwise import Constant
from jquant.types import Array, ConversionError, FrozenMap, Graph, Input, Node, Op

from .aten import TABLE, Call, Unsupported, format_shape, shape_of


def from_torch(module: Any, example_inputs: Any, *, dynamic_batch: bool = True) -> tuple[Graph, dict[str, Array]]:
    """Imports a torch module in eval mode.

    Args:
      module: any `torch.nn.Module` that `torch.export` can trace; its training flags are left as they were.
      example_inputs: the positional arguments of its forward, float32 tensors of any batch, such as `(x,)`.
      dynamic_batch: axis 0 of every input is a batch of any size; False fixes all shapes to the example.

    Returns:
      The graph, with nodes named by module path and the framework's NCHW layout, and {state-dict key: float32 array}.

    Raises:
      ConversionError: the model cannot be traced, uses operators jquant lacks (all are listed), or has bad parameters.
    """
    if not isinstance(module, torch.nn.Module):
        raise ConversionError(f"from_torch needs a torch.nn.Module, not {type(module).__name__}")
    arguments = _check_arguments(example_inputs, dynamic_batch)
    _check_dtypes(module)
    flags = {m: m.training for m in module.modules()}
    try:
        module.eval()
        program = _export(module, arguments, dynamic_batch)
    finally:
        for submodule, training in flags.items():
            submodule.training = training
    reader = _Reader(module, program, dynamic_batch)
    reader.read()
    return reader.build()


# ---------------------------------------------------------------------------------------------------------------------
# Export


def _check_arguments(example_inputs: Any, dynamic_batch: bool) -> tuple[Any, ...]:
    """The arguments as fresh tensors, with a batch of 1 repeated: torch.export specialises 1."""
    arguments = (example_inputs,) if isinstance(example_inputs, torch.Tensor) else tuple(example_inputs)
    leaves = pytree.tree_leaves(arguments)
    if not leaves:
        raise ConversionError("example_inputs is empty; pass the forward's arguments, such as (x,)")
    for i, leaf in enumerate(leaves):
        if not isinstance(leaf, torch.Tensor):
            raise ConversionError(f"example input {i} is {leaf!r}, not a tensor; wrap the module to fix this argument")
        if leaf.dtype != torch.float32:
            raise ConversionError(f"example input {i} is {leaf.dtype}; convert it to float32 before the model")
    if dynamic_batch:
        batches = sorted({leaf.shape[0] if leaf.ndim else None for leaf in leaves}, key=str)
        if len(batches) > 1 or batches[0] in (None, 0):
            shapes = ", ".join(str(list(leaf.shape)) for leaf in leaves)
            raise ConversionError(
                f"axis 0 of every input must be one batch, the example inputs have shapes {shapes}; "
                "give them equal batches, or pass dynamic_batch=False to fix all shapes"
            )
    repeats = 2 if dynamic_batch and leaves[0].shape[0] == 1 else 1
    return pytree.tree_map(lambda x: torch.cat([x.detach()] * repeats) if x.ndim else x.detach().clone(), arguments)


def _check_dtypes(module: torch.nn.Module) -> None:
    for key, tensor in (*module.named_parameters(), *module.named_buffers()):
        if (tensor.is_floating_point() or tensor.is_complex()) and tensor.dtype != torch.float32:
            raise ConversionError(f"parameter {key!r} is {tensor.dtype}; convert the model with module.float() first")


def _export(module: torch.nn.Module, arguments: tuple[Any, ...], dynamic_batch: bool) -> Any:
    try:
        return _trace(module, arguments, dynamic_batch)
    except Exception as error:  # torch.export raises a dozen types, and whatever the model's own code raises
        where, message = _user_line(error), _first_line(error)
        if dynamic_batch and _traces(module, arguments):
            raise ConversionError(
                f"the batch axis cannot stay symbolic: the model works for some batch sizes only{where} ({message}). "
                "Use flatten(1) or sizes taken from the input, or pass dynamic_batch=False to fix the batch"
            ) from error
        raise ConversionError(
            f"torch.export cannot trace {type(module).__name__}{where}: {message}. The forward must run on the example "
            "inputs and must not branch on tensor values: use torch.where, or import the parts around the branch"
        ) from error


def _trace(module: torch.nn.Module, arguments: tuple[Any, ...], dynamic_batch: bool) -> Any:
    shapes = torch.export.ShapesCollection()
    batch = torch.export.Dim("batch")
    for leaf in pytree.tree_leaves(arguments) if dynamic_batch else ():
        shapes[leaf] = {0: batch}
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        return torch.export.export(module, arguments, dynamic_shapes=shapes if dynamic_batch else None, strict=False)


def _traces(module: torch.nn.Module, arguments: tuple[Any, ...]) -> bool:
    try:
        _trace(module, arguments, dynamic_batch=False)
    except Exception:
        return False
    return True


def _user_line(error: BaseException | None) -> str:
    """The last line of the model's own code in the tracebacks of an error and its causes."""
    ours = (str(Path(torch.__file__).parent), str(Path(__file__).parent))
    while error is not None:
        for frame in reversed(traceback.extract_tb(error.__traceback__)):
            if not frame.filename.startswith(ours) and Path(frame.filename).is_file():
                return f" at {frame.filename}:{frame.lineno} `{frame.line}`"
            if frame.filename == __file__ and frame.name == "_trace":
                break  # what lies before is the caller of from_torch
        error = error.__cause__ or error.__context__
    return ""


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or ["no message"]
    if lines[0].startswith("Constraints violated"):  # what was violated is in the next line
        lines = lines[1:2] or lines
    return f"{type(error).__name__}: {lines[0][:300]}".rstrip(".")


# ---------------------------------------------------------------------------------------------------------------------
# Reading the exported program


@dataclass(frozen=True)
class _Param:
    """A parameter: its key, or None for a constant of the code, which is keyed by its first reader."""

    key: str | None
    tensor: torch.Tensor


@dataclass(eq=False)
class _Draft:
    """A node before it has a name."""

    op: Op
    source: FxNode
    operands: tuple[_Draft | Input, ...] = ()
    params: dict[str, _Param] = field(default_factory=dict)
    label: str = ""  # of a helper call
    constant_of: tuple[_Draft | None, str] = (None, "")  # who reads it first, and as what


class _Reader:
    """Turns the fx graph of an exported program into drafts, then names them."""

    def __init__(self, module: torch.nn.Module, program: Any, dynamic_batch: bool) -> None:
        self.module, self.program, self.dynamic_batch = module, program, dynamic_batch
        self.values: dict[FxNode, Any] = {}  # _Draft, Input, _Param, or None for what is no tensor or failed
        self.roots: dict[FxNode, FxNode] = {}  # the node that made a tensor's memory
        self.changed: dict[FxNode, set[FxNode]] = {}  # {root: readers that saw its last change in place}
        self.drafts: list[_Draft] = []
        self.constants: dict[int, _Draft] = {}  # by id of the _Param, one draft for each
        self.inputs: list[Input] = []
        self.outputs: list[_Draft] = []
        self.problems: list[str] = []

    # -- values

    def read(self) -> None:
        specs = {spec.arg.name: spec for spec in self.program.graph_signature.input_specs if hasattr(spec.arg, "name")}
        for node in self.program.graph.nodes:
            if node.op == "placeholder":
                self.values[node] = self.read_placeholder(node, specs.get(node.name))
            elif node.op == "call_function":
                self.read_call(node)
        if self.problems:
            raise ConversionError(
                "jquant has no operator for:\n  "
                + "\n  ".join(self.problems)
                + "\nReplace them in the model, import the part of the model before them, or add a handler to "
                "jquant_converters.aten.TABLE"
            )
        self.read_outputs()

    def read_placeholder(self, node: FxNode, spec: Any) -> Any:
        kind = spec.kind.name if spec else ""
        if kind in ("PARAMETER", "BUFFER", "CONSTANT_TENSOR"):
            tensor = self.program.state_dict.get(spec.target)
            tensor = self.program.constants.get(spec.target) if tensor is None else tensor
            named = kind != "CONSTANT_TENSOR" or not spec.target.startswith("lifted_tensor_")
            return _Param(spec.target if named else None, tensor)
        if kind == "USER_INPUT" and isinstance(node.meta.get("val"), torch.Tensor):
            shape = node.meta["val"].shape
            if self.dynamic_batch and isinstance(shape[0], int):
                raise ConversionError(
                    f"the batch axis of input {node.name!r} cannot stay symbolic: torch.export fixed it to {shape[0]}; "
                    "use sizes taken from the input or -1 in the model, or pass dynamic_batch=False"
                )
            entry = Input(node.name, tuple(n if isinstance(n, int) else None for n in shape))
            self.inputs.append(entry)
            return entry
        return None

    def read_call(self, node: FxNode) -> None:
        self.values[node] = None
        if not isinstance(node.meta.get("val"), torch.Tensor) and node.target not in TABLE and self.is_symbolic(node):
            return
        try:
            self.values[node] = self.convert(node)
        except Unsupported as reason:
            operands = [n for n in node.all_input_nodes if _is_tensor(n)]
            if node.target in TABLE and any(self.values[n] is None for n in operands):
                return  # only because an operand failed, which is listed
            shapes = [format_shape(shape_of(n)) for n in operands]
            where = self.path_of(node) or "the top level"
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
        target = node.target
        if getattr(target, "__name__", "") == "getitem":
            return None
        if target not in TABLE:
            raise Unsupported
        schema = target._schema.arguments
        arguments = list(node.args) + [
            node.kwargs.get(a.name, a.default_value if a.has_default_value() else None)
            for a in schema[len(node.args) :]
        ]
        source = arguments[0] if isinstance(arguments[0], FxNode) else None
        self.check_reads(node)
        result = TABLE[target](shape_of(node), *arguments)
        alias = schema[0].alias_info
        in_place = alias is not None and alias.is_write and isinstance(result, Call)
        if in_place and isinstance(self.values.get(source), _Param):
            raise Unsupported("it changes a parameter or buffer in place")
        value = self.values[result] if isinstance(result, FxNode) else self.draft(node, result)
        shares = target not in _COPIES and (isinstance(result, FxNode) or alias is not None or target in _MAY_ALIAS)
        self.roots[node] = self.roots.get(source, source) if shares and source is not None else node
        if in_place and source is not None:
            self.values[source] = value  # later reads see the change
            self.changed[self.roots[node]] = {node, source}
        elif shares and source is not None:
            root = self.roots[node]
            if root in self.changed:
                self.changed[root].add(node)
        return value

    def check_reads(self, node: FxNode) -> None:
        if any(self.is_stale(operand) for operand in node.all_input_nodes):
            raise Unsupported("it reads a tensor whose view was changed in place; use the out-of-place form")

    def is_stale(self, node: FxNode) -> bool:
        """Whether the memory of a tensor was changed through another name: jquant's values do not share memory."""
        fresh = self.changed.get(self.roots.get(node, node))
        return fresh is not None and node not in fresh

    def draft(self, node: FxNode, call: Call) -> _Draft:
        result = _Draft(call.op, node, label=call.label)
        names = [a.name for a in node.target._schema.arguments]
        many = isinstance(node.args[0], list | tuple)
        result.operands = tuple(
            self.operand(node, result, value, f"{names[0]}_{i}" if many else names[i])
            for i, value in enumerate(call.operands)
        )
        for role, parameter in call.params.items():
            if parameter is not None:
                value = self.values[parameter]
                if not isinstance(value, _Param):
                    raise Unsupported(f"its {role} is computed by the model; make it a plain parameter")
                result.params[role] = value
        self.drafts.append(result)
        return result

    def operand(self, node: FxNode, reader: _Draft, value: Any, role: str) -> Any:
        if isinstance(value, Call):
            return self.draft(node, value)
        if isinstance(value, FxNode):
            if not _is_tensor(value):
                raise Unsupported("it computes with the batch size; make it a constant")
            found = self.values[value]
            return self.constant(node, reader, found, role) if isinstance(found, _Param) else found
        if not isinstance(value, int | float):
            raise Unsupported(f"operand {value!r} is not a tensor or a number")
        return self.constant(node, reader, _Param(None, torch.tensor(float(value))), role)

    def constant(self, node: FxNode, reader: _Draft | None, parameter: _Param, role: str) -> _Draft:
        found = self.constants.get(id(parameter))
        if found is None:
            found = _Draft(Constant(), node, params={"value": parameter}, constant_of=(reader, role))
            self.constants[id(parameter)] = found
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
            if not _is_tensor(node):
                raise ConversionError(f"output {i} is {node!r}, not a tensor; return tensors only")
            value = self.values[node]
            if isinstance(value, Input):
                raise ConversionError(f"output {i} is the input {value.name!r} itself; leave it out of the outputs")
            if self.is_stale(node):
                raise ConversionError(
                    f"output {i} is a tensor whose view was changed in place; use the out-of-place form"
                )
            self.outputs.append(self.constant(node, None, value, "value") if isinstance(value, _Param) else value)
        if not self.outputs:
            raise ConversionError("the model returns no tensor")

    # -- names

    def path_of(self, node: FxNode) -> str:
        stack = list((node.meta.get("nn_module_stack") or {}).values())
        return stack[-1][0] if stack else ""

    def is_layer(self, path: str) -> bool:
        """Whether a path is that of a leaf torch.nn module, or of one derived from such."""
        try:
            module = self.module.get_submodule(path)
        except AttributeError:
            return False
        bases = type(module).__mro__
        known = any(b.__module__.startswith("torch.nn.") and b is not torch.nn.Module for b in bases)
        return bool(path) and known and not any(True for _ in module.children())

    def build(self) -> tuple[Graph, dict[str, Array]]:
        """Names go to layers first, then to parameters, then to functional calls; inputs take what is left."""
        calls = Counter(_call_of(d.source) for d in self.drafts if not d.label and not isinstance(d.op, Constant))
        names: dict[_Draft, str] = {}
        keys: dict[int, str] = {}
        taken: set[str] = set()
        known = {*self.program.state_dict, *self.program.constants}  # no constant of the code takes one of these keys

        def is_layer(draft: _Draft) -> bool:
            return calls[_call_of(draft.source)] == 1 and not draft.label and self.is_layer(self.path_of(draft.source))

        constants = [d for d in self.drafts if isinstance(d.op, Constant)]
        others = [d for d in self.drafts if not isinstance(d.op, Constant)]
        layers = [d for d in others if is_layer(d)]
        for draft in layers:
            names[draft] = _unique(self.path_of(draft.source), taken)
        for draft in constants:
            if key := draft.params["value"].key:
                names[draft] = _unique(key, taken)
        for draft in others:
            if draft not in names:
                parts = (self.path_of(draft.source), _op_name(draft.source), draft.label)
                names[draft] = _unique(".".join(p for p in parts if p), taken)
        for draft in constants:
            if draft not in names:
                reader, role = draft.constant_of
                names[draft] = _unique(f"{names[reader]}.{role}" if reader else "constant", taken)
                keys[id(draft.params["value"])] = _unique(names[draft], known)
        entries = {entry.name: Input(_unique(entry.name, taken), entry.shape) for entry in self.inputs}

        params: dict[str, Array] = {}
        nodes = []
        for draft in self.drafts:
            roles = {}
            for role, parameter in draft.params.items():
                key = parameter.key or keys.get(id(parameter)) or _unique(f"{names[draft]}.{role}", known)
                keys[id(parameter)] = key
                if key not in params:
                    params[key] = _to_array(key, parameter.tensor)
                roles[role] = key
            operands = tuple(entries[o.name].name if isinstance(o, Input) else names[o] for o in draft.operands)
            nodes.append(Node(names[draft], draft.op, operands, FrozenMap(roles)))
        graph = Graph(tuple(entries.values()), tuple(nodes), tuple(names[o] for o in self.outputs))
        graph = prune(graph)
        params = {key: params[key] for key in graph.param_names}
        return validate(graph, params), params


_COPIES = {torch.ops.aten.clone.default, torch.ops.aten.lift_fresh_copy.default}
_MAY_ALIAS = {torch.ops.aten.dropout.default}  # returns its input in eval mode, though the schema says otherwise


def _is_tensor(node: Any) -> bool:
    return isinstance(node, FxNode) and isinstance(node.meta.get("val"), torch.Tensor)


def _call_of(node: FxNode) -> Any:
    """One call of a module: its key in the module stack, which counts the calls of a shared module."""
    stack = list(node.meta.get("nn_module_stack") or {})
    return stack[-1] if stack else ""


def _op_name(node: FxNode) -> str:
    """`aten.add_.Tensor` -> "add"."""
    name: str = node.target._schema.name
    return name.split("::")[-1].strip("_")


def _unique(name: str, taken: set[str]) -> str:
    candidates = (name if i == 0 else f"{name}_{i}" for i in range(len(taken) + 1))
    found = next(c for c in candidates if c not in taken)
    taken.add(found)
    return found


def _to_array(key: str, tensor: torch.Tensor) -> Array:
    if tensor.dtype != torch.float32:
        raise ConversionError(f"parameter {key!r} is {tensor.dtype}; convert it to float32 in the model")
    if not bool(torch.isfinite(tensor).all()):
        raise ConversionError(f"parameter {key!r} contains NaN or infinite values; was the checkpoint loaded wrongly?")
    return jnp.array(tensor.detach().cpu().numpy())  # a copy: training the module further must not change it
