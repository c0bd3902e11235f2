"""Models in: a state or a program of this command line, .pt2, .onnx, or a Python callable with a checkpoint."""

import ast
import inspect
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import jax
import numpy as np
import typer
from jax.sharding import Mesh

from jquant.cli.console import UsageError
from jquant.cli.data import are_pictures, load_object
from jquant.cli.settings import Settings, joined_image, read_settings
from jquant.cli.state import NO_QCONFIG, State, load_state, program_image, read_header
from jquant.functions.trace import trace
from jquant.host.progress import stages
from jquant.program.files import load
from jquant.types import ConversionError, FormatError, Graph, Program

ModelPath = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A state (.jqs), model (.jqm) or program (.jq) of jquant, a .pt2 or .onnx file, or module:function or "
        "file.py:function, which returns a torch module, (module, example inputs), (graph, params), or "
        "(JAX function, params, example inputs).",
    ),
]
Checkpoint = Annotated[
    Path | None, typer.Option(help="A torch state dict for the module that MODEL returns; read without pickle.")
]
Shape = Annotated[
    list[str] | None, typer.Option(help="The shape of an input, such as 1,3,224,224; once for each input.")
]
Config = Annotated[
    Path | None, typer.Option("--config", "-c", help="TOML: the qconfig, march, image preprocessing and recipe.")
]
DataOption = Annotated[
    str,
    typer.Option(
        "--data", "-d", help="A folder of pictures, .npy, .npz (arrays by input name, or x and y), or module:function."
    ),
]
Batch = Annotated[int, typer.Option(min=1, help="Samples at once.")]
Samples = Annotated[int | None, typer.Option(min=1, help="Use this many samples at most.")]
Output = Annotated[Path, typer.Option("--output", "-o", help="The file to write.")]
Devices = Annotated[int | None, typer.Option(min=1, help="Spread each batch over this many devices of the machine.")]
Microbatch = Annotated[
    int | None, typer.Option(min=1, help="Samples that one device sees at once: less memory, and the same result.")
]


_WEIGHTS = "--checkpoint, beside a MODEL of the form module:function that makes the network"
_OTHER_OPTIONS = {".toml": "--config", ".npy": "--data", ".npz": "--data"} | dict.fromkeys(
    (".pt", ".pth", ".ckpt", ".tar", ".bin", ".safetensors"), _WEIGHTS
)


def load_model(source: str, checkpoint: Path | None = None, shapes: list[str] | None = None) -> State | Program:
    """A model from whatever names one.

    Raises:
      FormatError, FileNotFoundError, ConversionError: nothing there, or not readable, or not importable.
      UsageError: an option that does not belong to this kind of model.
    """
    path = Path(source)
    kind = path.suffix.lower()
    if kind in _OTHER_OPTIONS:
        raise UsageError(f"{source} is no model: give it with {_OTHER_OPTIONS[kind]}")
    if checkpoint is not None and (kind in (".pt2", ".onnx", ".jq", ".jqs") or ":" not in source):
        raise UsageError("--checkpoint belongs to a MODEL of the form module:function")
    if kind in (".pt2", ".onnx"):
        return _foreign(path, kind)
    if path.is_file() and kind != ".py":
        return load(path) if "program" in read_header(path) else load_state(path)
    if ":" in source:
        return _called(source, checkpoint, shapes)
    if kind == ".py" and path.is_file():
        raise UsageError(f"{source}: name what makes the model in it too, such as {source}:{_makers(path)}")
    if path.exists():
        raise FormatError(f"{source}: a model is a file of this tool, .pt2, .onnx, or module:function")
    raise FileNotFoundError(f"no model at {source}")


def load_state_of(
    source: str,
    config: Path | None = None,
    checkpoint: Path | None = None,
    shapes: list[str] | None = None,
    *,
    needs_qconfig: bool = False,
) -> tuple[State, Settings]:
    """A model that is not a program yet, under the qconfig of a file.

    Raises:
      UsageError: a program, or a model that can have no qconfig where one is needed: said before it is imported.
      Otherwise as `load_model`.
    """
    if needs_qconfig and config is None and (":" in source or Path(source).suffix.lower() in (".pt2", ".onnx")):
        raise UsageError(NO_QCONFIG)
    model, settings = load_with_settings(source, config, checkpoint, shapes)
    if isinstance(model, Program):
        raise UsageError(f"{source} is a program; this command needs the state it was made from, or the float model")
    return model, settings


def load_with_settings(
    source: str,
    config: Path | None = None,
    checkpoint: Path | None = None,
    shapes: list[str] | None = None,
) -> tuple[State | Program, Settings]:
    """A model under the qconfig of a file, and the settings with the preprocessing that the model was made with.

    Raises:
      FormatError: two preprocessings that differ. Otherwise as `load_model`.
    """
    settings = read_settings(config)
    model = load_model(source, checkpoint, shapes)
    if isinstance(model, Program):
        image = joined_image(program_image(Path(source)), settings, source)
    else:
        model = model.under(settings, source)
        image = model.image
    return model, settings if image is None else replace(settings, image=image, has_image=True)


def _foreign(path: Path, kind: str) -> State:
    if not path.is_file():
        raise FileNotFoundError(f"no model at {path}")
    name = {".pt2": "from_torch", ".onnx": "from_onnx"}[kind]
    with stages("loading", ("the converters", path.name)) as begin:
        begin("the converters")
        import jquant_converters

        convert = getattr(jquant_converters, name, None)
        if convert is None:
            raise ConversionError(f"{path}: reading {kind} files is not available in this release; use module:function")
        begin(path.name)
        return State(*convert(path)[:2])


def _called(source: str, checkpoint: Path | None, shapes: list[str] | None) -> State:
    with stages("loading", ("the converters", source)) as begin:
        begin("the converters")
        from jquant_converters.command_line import import_module

        begin(source)
        make = load_object(source)
        is_made = not callable(make) or (hasattr(make, "state_dict") and not isinstance(make, type))
        made: Any = make if is_made else _call(make, source)
    if isinstance(made, tuple) and len(made) == 3 and callable(made[0]) and not hasattr(made[0], "state_dict"):
        return State(*trace(made[0], made[1], *made[2]))
    if isinstance(made, tuple) and len(made) == 2 and isinstance(made[0], Graph):
        if checkpoint is not None or shapes:
            raise UsageError("--checkpoint and --shape belong to a torch module; MODEL gave a graph")
        return State(made[0], made[1])
    module, example = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    if not hasattr(module, "state_dict"):
        raise FormatError(f"{source} gave {type(module).__name__}; it must give a torch module, or (graph, params)")
    if example is None and not shapes:
        raise UsageError(
            f"{source} gave a module without example inputs: give --shape for each input, such as --shape 1,3,224,224"
        )
    sizes = [_shape(text) for text in shapes or ()]
    return State(*import_module(module, example, sizes, checkpoint))


def _call(make: Any, source: str) -> Any:
    """What a function or a class gives without arguments.

    Raises:
      UsageError: it takes some.
    """
    try:
        inspect.signature(make).bind()
    except TypeError as error:
        raise UsageError(f"{source}: {error}; name a function without arguments that returns the model") from error
    except ValueError:  # it has no signature
        pass
    return make()


def _makers(path: Path) -> str:
    """Functions and classes of a file that need no arguments to be called, the last ones first; or "make"."""
    try:
        nodes = ast.parse(path.read_bytes()).body
    except (SyntaxError, ValueError):
        return "make"
    functions = [n.name for n in nodes if isinstance(n, ast.FunctionDef) and len(n.args.args) == len(n.args.defaults)]
    classes = [n.name for n in nodes if isinstance(n, ast.ClassDef)]
    names = [name for name in (*reversed(functions), *reversed(classes)) if not name.startswith("_")]
    return " or ".join(names[:3]) or "make"


def _shape(text: str) -> tuple[int, ...]:
    try:
        size = tuple(int(part) for part in text.replace("x", ",").split(","))
    except ValueError as error:
        raise UsageError(f"--shape {text!r}: integers with commas, such as 1,3,224,224") from error
    if min(size) < 1:
        raise UsageError(f"--shape {text!r}: sizes are positive")
    return size


def mesh_of(devices: int | None) -> Mesh | None:
    """The first devices of this machine, along the axis "data"; None for what JAX does by itself.

    Raises:
      UsageError: there are not so many.
    """
    if devices is None:
        return None
    known = jax.local_devices()
    if devices > len(known):
        platform = known[0].platform
        more = " (XLA_FLAGS=--xla_force_host_platform_device_count makes more of a CPU)" if platform == "cpu" else ""
        raise UsageError(f"--devices {devices}: this machine has {len(known)} of platform {platform}{more}")
    return Mesh(np.array(known[:devices]), ("data",))


def used_on(state: State, settings: Settings, data: str) -> State:
    """The state that remembers how the pictures of a folder became its inputs, defaults included."""
    return replace(state, image=settings.image) if are_pictures(Path(data)) else state
