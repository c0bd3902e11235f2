"""The table from primitives of JAX to operators, a family a file. What it lacks becomes an `Opaque` node."""

from jquant.functions.trace.primitives import elementwise, gemm, indexing, movement, reduce, scatter

TABLE = {**elementwise.TABLE, **movement.TABLE, **reduce.TABLE, **gemm.TABLE, **indexing.TABLE, **scatter.TABLE}
