"""Data in: folders of pictures, .npy and .npz files, and Python callables `module:function` or `file.py:function`."""

import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Generic, TypeVar
from zipfile import BadZipFile

import jax.numpy as jnp
import numpy as np

from jquant.cli.settings import ImageSettings
from jquant.types import Array, FormatError, Graph, Input, InputError

DECODERS = 8  # threads; more than cores, since they wait for files
PICTURES = (".jpg", ".jpeg", ".png", ".bmp", ".ppm", ".webp")
SPLITS = frozenset(("train", "training", "val", "valid", "validation", "test", "testing"))
BESIDE_IMAGES = frozenset(("mask", "masks", "label", "labels", "annotation", "annotations", "gt", "gtfine"))
IMAGES = frozenset(("image", "images", "img", "imgs", "jpegimages", "leftimg8bit"))

Batch = tuple[tuple[np.ndarray, ...], np.ndarray | None]
Item = TypeVar("Item")


@dataclass(frozen=True)
class Counted(Generic[Item]):
    """Items of which it is known how many there are."""

    items: Iterable[Item]
    count: int

    def __iter__(self) -> Iterator[Item]:
        return iter(self.items)

    def __len__(self) -> int:
        return self.count


@dataclass(frozen=True)
class Data:
    """Batches, read again at every pass.

    `read(size)`  batches of (inputs, labels or None), in order
    `count`       the number of samples, where it is known
    `take(order, size)`  batches of the samples with these numbers, in this order; None where data are read from the
                  front only
    `by_class`    True where neighbours are often of one class, so that a part is taken evenly from all
    """

    read: Callable[[int], Iterator[Batch]]
    count: int | None
    labelled: bool
    take: Callable[[np.ndarray, int], Iterator[Batch]] | None = None
    by_class: bool = False

    def batches(self, size: int, limit: int | None = None) -> Iterator[Batch]:
        """Batches of up to `size` samples, `limit` samples at most; equal ones where that is near, see `even_size`.

        Fewer than there are: the first ones, or of a folder of pictures every second, third or n-th.
        """
        size, seen = self.even_size(size, limit), 0
        count = self.count
        if self.take is not None and self.by_class and limit is not None and count is not None and limit < count:
            yield from self.take(np.arange(limit) * count // limit, size)
            return
        for inputs, labels in self.read(size):
            room = len(inputs[0]) if limit is None else min(len(inputs[0]), limit - seen)
            if room <= 0:
                return
            yield tuple(x[:room] for x in inputs), None if labels is None else labels[:room]
            seen += room

    def even_size(self, size: int, limit: int | None = None) -> int:
        """The size of batches: `size`, or a little less where all of them are equal then.

        A smaller last batch is another shape, for which XLA compiles everything once more.
        """
        total = self.count if self.count is None or limit is None else min(self.count, limit)
        if not total:
            return size
        return next((n for n in range(size, size // 2, -1) if total % n == 0), size)

    def steps(self, size: int, limit: int | None = None) -> int | None:
        """How many batches there are, where that is known."""
        total = limit if self.count is None else min(self.count, limit or self.count)
        return None if total is None else -(-total // self.even_size(size, limit))

    def inputs(self, size: int, limit: int | None = None) -> Iterable[tuple[Array, ...]]:
        """The batches without their labels; their number is the length, where it is known."""
        steps = self.steps(size, limit)
        found = (tuple(jnp.asarray(x) for x in arrays) for arrays, _ in self.batches(size, limit))
        return found if steps is None else Counted(found, steps)


def are_pictures(path: Path) -> bool:
    """Whether data are a folder of pictures, or one picture."""
    return path.is_dir() or (path.suffix.lower() in PICTURES and path.is_file())


def check_data(source: str) -> None:
    """Raises what `load_data` would for a source that is not there, before a model is loaded."""
    module, is_function, _ = source.rpartition(":")
    if Path(source).exists() or (is_function and not module.endswith(".py")) or Path(module).is_file():
        return
    if is_function:
        raise FileNotFoundError(f"no Python file {module}")
    raise FileNotFoundError(f"no data at {source}; give a folder of pictures, .npy, .npz, or module:function")


def load_data(source: str, graph: Graph, image: ImageSettings) -> Data:
    """Data for a graph.

    Args:
      source: a folder of pictures, a picture, a .npy or .npz file, or `module:function`.
      graph: says which inputs there are, and their dtypes.
      image: the preprocessing of pictures.

    Raises:
      FileNotFoundError, FormatError: nothing there, or not readable. InputError: arrays that do not fit.
    """
    check_data(source)
    path = Path(source)
    if are_pictures(path):
        return _folder(path, graph, image)
    if path.suffix in (".npy", ".npz"):
        return _arrays(read_arrays(path), graph, source)
    if ":" in source:
        return _callable(source, graph)
    raise FormatError(f"{source}: data is a folder of pictures, .npy, .npz, or module:function")


# ---------------------------------------------------------------------------------------------------------------------
# Arrays


def read_arrays(path: Path) -> Any:
    """The array of a .npy, or {name: array} of a .npz file."""
    if not path.is_file():
        raise FileNotFoundError(f"no data at {path}")
    try:
        with path.open("rb") as file:  # np.load leaks one that it opens itself and cannot read
            loaded = np.load(file, allow_pickle=False)
            return {name: loaded[name] for name in loaded.files} if path.suffix == ".npz" else loaded
    except (ValueError, OSError, KeyError, EOFError, BadZipFile) as error:
        raise FormatError(f"{path}: not a readable file of arrays: {error}") from error


def _arrays(found: Any, graph: Graph, source: str) -> Data:
    """An array, or {"x" or the name of an input: array, "y": labels}."""
    inputs, labels = split(found, graph, source)
    count = len(inputs[0])

    def of(part: Any) -> Batch:
        return tuple(x[part] for x in inputs), None if labels is None else labels[part]

    def read(size: int) -> Iterator[Batch]:
        return (of(slice(i, i + size)) for i in range(0, count, size))

    def take(order: np.ndarray, size: int) -> Iterator[Batch]:
        return (of(order[i : i + size]) for i in range(0, len(order), size))

    return Data(read, count, labels is not None, take)


def split(found: Any, graph: Graph, source: str) -> Batch:
    """Inputs in the order of the graph, and labels.

    Args:
      found: arrays by name; one array; a tuple of the inputs, and behind them the labels, if there are any; or a pair
        of inputs, by name or in a tuple, and labels.

    Raises:
      InputError: an array that is missing, or none, or of another dtype; another number of samples.
    """
    names = [entry.name for entry in graph.inputs]
    found = _by_name(found, names, source)
    if len(names) == 1 and names[0] not in found and "x" in found:
        found = {**found, names[0]: found["x"]}
    missing = [name for name in names if name not in found]
    if missing:
        raise InputError(
            f"{source}: no array {missing[0]!r}; it has {', '.join(map(repr, found)) or 'none'}. Name the arrays like "
            f"the inputs of the graph ({', '.join(names)}), and labels 'y'"
        )
    arrays = tuple(_input(found[entry.name], entry, source) for entry in graph.inputs)
    labels = _array(found["y"], f"{source}: 'y', the labels,") if "y" in found and "y" not in names else None
    sizes = {len(a) if a.ndim else 0 for a in (*arrays, *(() if labels is None else (labels,)))}
    if len(sizes) != 1 or 0 in sizes:
        raise InputError(f"{source}: arrays of {sorted(sizes)} samples; every array needs as many, and at least one")
    return arrays, labels


def _by_name(found: Any, names: list[str], source: str) -> Mapping[str, Any]:
    if isinstance(found, Mapping):
        return found
    parts = list(found) if isinstance(found, tuple | list) else [found]
    if len(parts) == 2 and isinstance(parts[0], Mapping | tuple | list):
        return {**_by_name(parts[0], names, source), "y": parts[1]}
    if len(parts) not in (len(names), len(names) + 1):
        raise InputError(
            f"{source}: a batch of {len(parts)} arrays; the graph takes {', '.join(names)}. Give these in order, and "
            "behind them one array of labels, or none"
        )
    return dict(zip((*names, "y"), parts, strict=False))


def _array(value: Any, what: str) -> np.ndarray:
    """Raises InputError for what numpy can make no array of numbers of, such as several arrays, or a tensor that is on
    a device or has a gradient."""
    try:
        array = np.asarray(value)
    except (ValueError, TypeError, RuntimeError) as error:
        raise InputError(f"{what} is {type(value).__name__}, and no array: {error}") from error
    if array.dtype.kind not in "biufc":
        raise InputError(f"{what} is {type(value).__name__}, and no array of numbers; give one array")
    return array


def _input(value: Any, entry: Input, source: str) -> np.ndarray:
    what = f"{source}: {entry.name!r}"
    array = _as(_array(value, what), entry.dtype, what)
    if array.ndim == len(entry.shape) - 1 and entry.shape[:1] == (None,):
        wanted = ", ".join(map(str, ("batch", *entry.shape[1:])))
        raise InputError(
            f"{what} is {list(array.shape)}, and the graph takes [{wanted}]: an axis of samples is missing in front. "
            "Give x[None], or wrap a torch Dataset in a DataLoader"
        )
    return array


def _as(array: np.ndarray, dtype: str, what: str) -> np.ndarray:
    """Wider or narrower floats become float32; integers do not silently become floats."""
    if str(array.dtype) == dtype:
        return array
    if dtype == "float32" and array.dtype.kind == "f":
        return array.astype(np.float32)
    if dtype in ("int32", "uint8") and array.dtype.kind in "iu" and array.size:
        low, high = np.iinfo(dtype).min, np.iinfo(dtype).max
        if array.min() >= low and array.max() <= high:
            return array.astype(dtype)
    is_index = dtype == "float32" and array.dtype in ("int32", "int64")
    other = ". For an input of integers, MODEL returns (module, example inputs)" if is_index else ""
    raise InputError(f"{what} is {array.dtype}, the graph takes {dtype}; convert and scale it before{other}")


# ---------------------------------------------------------------------------------------------------------------------
# Callables


def load_object(source: str) -> Any:
    """What `module:name` or `file.py:name` names. The current folder is on the path."""
    module_name, _, name = source.rpartition(":")
    if not module_name or not name:
        raise FormatError(f"{source!r} is no module:function")
    if "" not in sys.path:
        sys.path.insert(0, "")
    try:
        if module_name.endswith(".py"):
            path = Path(module_name)
            spec = importlib.util.spec_from_file_location(path.stem, path)
            if spec is None or spec.loader is None or not path.is_file():
                raise FileNotFoundError(f"no Python file {module_name}")
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
        else:
            module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise FormatError(f"{source}: {error}; run where it can be imported, or give file.py:function") from error
    if not hasattr(module, name):
        raise FormatError(f"{source}: {module_name} has no {name!r}")
    return getattr(module, name)


def _callable(source: str, graph: Graph) -> Data:
    make = load_object(source)
    if not callable(make):
        raise FormatError(f"{source} is {type(make).__name__}, not a function")
    first = make()
    if isinstance(first, Mapping | np.ndarray | tuple) or hasattr(first, "__jax_array__") or hasattr(first, "shape"):
        return _arrays(first, graph, source)

    def read(size: int) -> Iterator[Batch]:
        """The function is called for every pass, and decides the size of its batches."""
        for batch in make():
            yield split(batch, graph, source)

    try:
        labelled = split(next(iter(first)), graph, source)[1] is not None
    except (TypeError, StopIteration) as error:
        raise FormatError(f"{source} gave {type(first).__name__}, which is no data: {error}") from error
    return Data(read, None, labelled)


# ---------------------------------------------------------------------------------------------------------------------
# Pictures


def _folder(folder: Path, graph: Graph, image: ImageSettings) -> Data:
    if len(graph.inputs) != 1:
        names = ", ".join(entry.name for entry in graph.inputs)
        raise InputError(f"{folder}: pictures are one input, and the graph has {names}: give .npz or module:function")
    wanted = graph.inputs[0].shape[1:]
    files = [folder] if folder.is_file() else folder.rglob("*")
    paths = sorted(p for p in files if p.suffix.lower() in PICTURES and p.is_file())
    if not paths:
        raise FormatError(f"{folder}: no pictures ({', '.join(PICTURES)}) in it or its folders")
    labels = None if folder.is_file() else _labels(folder, paths, image)

    def take(order: np.ndarray, size: int) -> Iterator[Batch]:
        pictures = _decoded(
            [paths[i] for i in order], lambda path: _fitting(read_image(path, image), wanted, path, image), size
        )
        for start, pixels in zip(range(0, len(order), size), pictures, strict=True):
            yield (pixels,), None if labels is None else labels[order[start : start + size]]

    return Data(partial(take, np.arange(len(paths))), len(paths), labels is not None, take, by_class=True)


def _decoded(paths: list[Path], read: Callable[[Path], np.ndarray], size: int) -> Iterator[np.ndarray]:
    """Batches of pictures, decoded in threads ahead of their use."""
    try:
        import grain
    except ImportError as error:
        raise ImportError("folders of pictures need grain: pip install 'jquant[cli]'") from error
    options = grain.ReadOptions(num_threads=DECODERS, prefetch_buffer_size=2 * size)
    pictures = grain.MapDataset.source(paths).map(read).to_iter_dataset(options)
    yield from pictures.batch(size, drop_remainder=False)


def _fitting(picture: np.ndarray, wanted: tuple[int | None, ...], path: Path, image: ImageSettings) -> np.ndarray:
    """A picture that has the shape of the input.

    Raises:
      InputError: another shape, with the settings that decide it.
    """
    if picture.shape != wanted:
        raise InputError(
            f"{path}: the picture becomes {list(picture.shape)}, and the graph takes {list(wanted)}. The table [image] "
            "of the --config file says its size (resize, crop), channels (color) and order (layout)"
            f"{_resized(wanted, image)}"
        )
    return picture


def _resized(wanted: tuple[int | None, ...], image: ImageSettings) -> str:
    """The size that an input of pictures asks for."""
    size = wanted[1:] if image.layout == "nchw" else wanted[:2]
    return f", such as resize = {list(size)}" if len(wanted) == 3 and None not in size else ""


def _labels(folder: Path, paths: list[Path], image: ImageSettings) -> np.ndarray | None:
    """Class numbers: of the sub-folders in sorted order, or of the names; None where there are none."""
    if image.labels == "stem":
        if not all(p.stem.isdigit() for p in paths):
            raise FormatError(f"{folder}: image.labels = 'stem' needs files named by class number, such as 0042.jpg")
        return np.array([int(p.stem) for p in paths], np.int32)
    parents = [p.relative_to(folder).parts[0] if p.parent != folder else None for p in paths]
    _check_classes(folder, sorted({p for p in parents if p is not None}))
    if None in parents:
        return None
    classes = {name: i for i, name in enumerate(sorted({str(p) for p in parents}))}
    return np.array([classes[str(p)] for p in parents], np.int32)


def _check_classes(folder: Path, names: list[str]) -> None:
    """Folders that are no classes: the parts of a data set, and pictures beside their masks.

    Raises:
      FormatError: such folders, with those to give.
    """
    lower = {name.lower() for name in names}
    if len(names) > 1 and lower <= SPLITS:
        raise FormatError(
            f"{folder}: its folders {', '.join(names)} are parts of a data set, not classes; give one of them, such as "
            f"{folder / names[0]}"
        )
    if lower & IMAGES and lower & BESIDE_IMAGES:
        images = next(name for name in names if name.lower() in IMAGES)
        raise FormatError(
            f"{folder}: its folders {', '.join(names)} are pictures and their labels, not classes. Give "
            f"{folder / images} for the pictures alone; with labels give file.py:function, which gives batches of "
            "(inputs, labels)"
        )


def read_image(path: Path, image: ImageSettings) -> np.ndarray:
    """A picture as an input without batch, float32."""
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError("pictures need pillow: pip install 'jquant[cli]'") from error
    try:
        with Image.open(path) as opened:
            if image.draft and (least := _least_size(image)):
                opened.draft(None, least)
            picture = opened.convert("L" if image.color == "gray" else "RGB")
    except OSError as error:
        raise FormatError(f"{path}: not a readable picture: {error}") from error
    picture = _crop(_resize(picture, image), image, path)
    pixels = np.asarray(picture)
    real = _colour(pixels[..., None] if pixels.ndim == 2 else pixels, image)
    channels = real.shape[-1]
    for name in ("mean", "std"):
        if len(getattr(image, name)) not in (1, channels):
            raise FormatError(f"image.{name} has {len(getattr(image, name))} numbers for {channels} channels")
    real = (real / np.float32(image.divisor) - np.array(image.mean, np.float32)) / np.array(image.std, np.float32)
    return real.transpose(2, 0, 1) if image.layout == "nchw" else real


def _least_size(image: ImageSettings) -> tuple[int, int] | None:
    """The width and height that a JPEG has to have for `_resize`; None where it is taken as it is."""
    if image.resize is None:
        return None
    height, width = image.resize if isinstance(image.resize, tuple) else (image.resize, image.resize)
    return width, height


def _resize(picture: Any, image: ImageSettings) -> Any:
    if image.resize is None:
        return picture
    width, height = picture.size
    if isinstance(image.resize, tuple):
        height, width = image.resize
    else:
        short = min(width, height)
        width, height = (max(image.resize, round(n * image.resize / short)) for n in (width, height))
    return picture.resize((width, height), 2)  # bilinear


def _crop(picture: Any, image: ImageSettings, path: Path) -> Any:
    if image.crop is None:
        return picture
    height, width = image.crop if isinstance(image.crop, tuple) else (image.crop, image.crop)
    left, top = (picture.width - width) // 2, (picture.height - height) // 2
    if left < 0 or top < 0:
        raise FormatError(f"{path}: {picture.height}x{picture.width} is smaller than the crop; set image.resize")
    return picture.crop((left, top, left + width, top + height))


def _colour(pixels: np.ndarray, image: ImageSettings) -> np.ndarray:
    if image.color == "bgr":
        return pixels[..., ::-1].astype(np.float32)
    if image.color.startswith("yuv444"):
        from jquant.images import rgb_to_centred_yuv444

        swing: Any = "studio" if image.color.endswith("studio") else "full"
        return np.asarray(rgb_to_centred_yuv444(jnp.asarray(pixels), swing=swing)).astype(np.float32)
    return pixels.astype(np.float32)
