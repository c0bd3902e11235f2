"""Exact values: masks, indices and pixels, which are never quantized. What torch calls them."""

import torch

# Of values in the graph. Integers of any width are int32 there.
DTYPES = {
    torch.float32: "float32",
    torch.bool: "bool",
    torch.uint8: "uint8",
    torch.int8: "int32",
    torch.int16: "int32",
    torch.int32: "int32",
    torch.int64: "int32",
}
