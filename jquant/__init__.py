"""jquant: quantization for JAX as pure functions, and an integer simulator of the Nash BPU.

The way of a model: a float `Graph` (imported by `jquant_converters.from_torch`), `prepare`, `calibrate`, `apply` or
`apply_train` (fake-quant), `lower`, `run` (integers). Every step is a pure function of pytrees.

The public names are those of `jquant.api`. They load when the first of them is used, so that `jquant --help` does not
wait for jax.
"""

try:
    import jquant.host.interrupts  # it answers Ctrl-C while the rest is imported
except KeyboardInterrupt:  # which came in between
    import jquant.host.interrupts

    jquant.host.interrupts.end()
    raise

from typing import TYPE_CHECKING

__version__ = "0.2.0"

if TYPE_CHECKING:
    from jquant.api import *  # noqa: F403
else:  # a type checker would take a module's __getattr__ for any name

    def __getattr__(name: str) -> object:
        from importlib import import_module
        from importlib.util import find_spec

        if not name.startswith("__") and find_spec(f"{__name__}.{name}"):
            return import_module(f"{__name__}.{name}")
        api = import_module(f"{__name__}.api")
        if name != "__all__" and name not in api.__all__:
            from sys import modules

            raise AttributeError(f"module {__name__!r} has no attribute {name!r}", name=name, obj=modules[__name__])
        globals().update({public: getattr(api, public) for public in ("__all__", *api.__all__)})
        return globals()[name]

    def __dir__() -> list[str]:
        return sorted({*globals(), *__getattr__("__all__")})
