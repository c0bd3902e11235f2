"""Fixtures of Brevitas: QCDQ and QONNX files of layers of brevitas.nn. Argument: folder."""

import sys
from pathlib import Path

import brevitas.nn as qnn
import onnx
import torch
from brevitas.export import export_onnx_qcdq, export_qonnx
from brevitas.quant import Int8ActPerTensorFloat, Int8Bias, Int8WeightPerChannelFloat, Uint8ActPerTensorFloat
from nets import save
from torch import nn


class Net(nn.Module):
    """Convolutions with quantized weights, biases and activations; an addition and a linear layer.

    `unsigned`: the activations behind a ReLU are uint8, as QuantReLU's own default is.
    """

    def __init__(self, bits: int, unsigned: bool) -> None:
        super().__init__()
        weight = {"weight_quant": Int8WeightPerChannelFloat, "weight_bit_width": bits, "bias_quant": Int8Bias}
        relu = {"act_quant": Uint8ActPerTensorFloat if unsigned else Int8ActPerTensorFloat, "return_quant_tensor": True}
        signed = {"act_quant": Int8ActPerTensorFloat, "return_quant_tensor": True}
        self.x = qnn.QuantIdentity(**signed)
        self.stem = qnn.QuantConv2d(3, 6, 3, stride=2, padding=1, bias=True, **weight)
        self.stem_relu = qnn.QuantReLU(**relu)
        self.first = qnn.QuantConv2d(6, 6, 3, padding=1, bias=True, **weight)
        self.first_relu = qnn.QuantReLU(**relu)
        self.add = qnn.QuantIdentity(**signed)
        self.flat = nn.Flatten()
        self.head = qnn.QuantLinear(96, 5, bias=True, **weight)
        self.out = qnn.QuantIdentity(act_quant=Int8ActPerTensorFloat)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem_relu(self.stem(self.x(x)))
        y = self.add(self.first_relu(self.first(x)).value + x.value)
        return self.out(self.head(self.flat(y)))


FILES = {"signed_8": (8, False), "signed_4": (4, False), "unsigned_8": (8, True)}


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)  # sums in one order
    for name, (bits, unsigned) in FILES.items():
        torch.manual_seed(24)
        net = Net(bits, unsigned)
        net.train()
        for _ in range(3):  # statistics of the activations
            net(torch.randn(4, 3, 8, 8))
        net.eval()
        x = torch.randn(3, 3, 8, 8)
        with torch.no_grad():
            expected = net(x)
        for form, export in (("qcdq", export_onnx_qcdq), ("qonnx", export_qonnx)):
            path = folder / f"{form}_{name}.onnx"
            export(net, args=x, export_path=str(path), opset_version=17, dynamo=False)
            save(folder, f"{form}_{name}", onnx.load(path), x.numpy(), [expected.numpy()])


if __name__ == "__main__":
    main(Path(sys.argv[1]))
