"""The blocks of EfficientNet and MobileNet, with timm's parameter names.

Sandler et al. 2018, "MobileNetV2: Inverted Residuals and Linear Bottlenecks"; Howard et al. 2019,
"Searching for MobileNetV3" (squeeze-and-excitation inside); Tan and Le 2021, "EfficientNetV2"
(the fused block, here `EdgeResidual`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch.nn.functional as F
from torch import Tensor, nn

from deploykit.backbones.features import ReceptiveField

Padding: TypeAlias = Literal["symmetric", "same"]
"""``symmetric`` is PyTorch's; ``same`` is TensorFlow's, which puts the odd pixel right and below."""
ModuleFactory: TypeAlias = Callable[[], nn.Module]


def relu() -> nn.Module:
    """Return ``max(x, 0)``."""
    return nn.ReLU(inplace=True)


def relu6() -> nn.Module:
    """Return ``min(max(x, 0), 6)``."""
    return nn.ReLU6(inplace=True)


def silu() -> nn.Module:
    """Return ``x * sigmoid(x)``, also called swish."""
    return nn.SiLU(inplace=True)


@dataclass(frozen=True, kw_only=True)
class ConvStyle:
    """What all blocks of one network share; ``se_activation`` None stands for ``activation``."""

    activation: ModuleFactory = silu
    padding: Padding = "symmetric"
    bn_eps: float = 1e-5
    bn_momentum: float = 0.1
    se_activation: ModuleFactory | None = None
    se_gate: ModuleFactory = nn.Sigmoid


class Conv2dSame(nn.Conv2d):
    """A convolution with TensorFlow's SAME padding: the output has ``ceil(size / stride)`` pixels a side.

    The padding depends on the image's size, which is a Python int when a graph is traced: the
    graph gets constant padding, inside the convolution where it is symmetric.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Map ``(N, C, H, W)`` to ``(N, D, ceil(H / stride), ceil(W / stride))``."""
        height, width = input.shape[2:]
        top, bottom = same_padding(height, self.kernel_size[0], self.stride[0], self.dilation[0])
        left, right = same_padding(width, self.kernel_size[1], self.stride[1], self.dilation[1])
        padding = (top, left)
        if (top, left) != (bottom, right):
            input = F.pad(input, (left, right, top, bottom))
            padding = (0, 0)
        return F.conv2d(input, self.weight, self.bias, self.stride, padding, self.dilation, self.groups)


def same_padding(size: int, kernel: int, stride: int, dilation: int) -> tuple[int, int]:
    """Return the pixels to add before and after a side: the odd one comes after."""
    total = max((-(-size // stride) - 1) * stride + (kernel - 1) * dilation + 1 - size, 0)
    return total // 2, total - total // 2


def conv2d(
    in_channels: int,
    out_channels: int,
    kernel: int,
    *,
    stride: int = 1,
    dilation: int = 1,
    groups: int = 1,
    padding: Padding = "symmetric",
    bias: bool = False,
) -> nn.Conv2d:
    """Return a convolution that keeps ``ceil(size / stride)`` pixels a side under either padding."""
    span = dilation * (kernel - 1)
    static = padding == "symmetric" or (stride == 1 and span % 2 == 0)
    kind = nn.Conv2d if static else Conv2dSame
    return kind(
        in_channels,
        out_channels,
        kernel,
        stride=stride,
        padding=(stride - 1 + span) // 2 if static else 0,
        dilation=dilation,
        groups=groups,
        bias=bias,
    )


class BatchNormAct2d(nn.BatchNorm2d):
    """Batch normalisation and its activation in one module: the parameters lie directly under its name."""

    def __init__(self, channels: int, style: ConvStyle, *, activate: bool = True) -> None:
        super().__init__(channels, eps=style.bn_eps, momentum=style.bn_momentum)
        self.act = style.activation() if activate else nn.Identity()

    def forward(self, input: Tensor) -> Tensor:
        """Map ``(N, C, H, W)`` to the same shape."""
        output: Tensor = self.act(super().forward(input))
        return output


class SqueezeExcite(nn.Module):
    """A gate a channel from the mean of the whole map (Hu et al. 2018); ``(N, C, H, W)`` to the same."""

    def __init__(self, channels: int, reduced: int, style: ConvStyle) -> None:
        super().__init__()
        self.conv_reduce = nn.Conv2d(channels, reduced, 1)
        self.act1 = (style.se_activation or style.activation)()
        self.conv_expand = nn.Conv2d(reduced, channels, 1)
        self.gate = style.se_gate()

    def forward(self, features: Tensor) -> Tensor:
        """Scale each channel."""
        gate = features.mean((2, 3), keepdim=True)
        gate = self.conv_expand(self.act1(self.conv_reduce(gate)))
        scaled: Tensor = features * self.gate(gate)
        return scaled


def _squeeze_excite(channels: int, reduced: int, style: ConvStyle) -> nn.Module:
    return SqueezeExcite(channels, reduced, style) if reduced else nn.Identity()


class ConvBnAct(nn.Module):
    """Convolution, norm, activation; with a shortcut where ``skip`` and the shapes allow it."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: int,
        *,
        style: ConvStyle,
        stride: int = 1,
        dilation: int = 1,
        skip: bool = False,
    ) -> None:
        super().__init__()
        self.has_skip = skip and stride == 1 and in_channels == out_channels
        self.conv = conv2d(in_channels, out_channels, kernel, stride=stride, dilation=dilation, padding=style.padding)
        self.bn1 = BatchNormAct2d(out_channels, style)

    def forward(self, features: Tensor) -> Tensor:
        """Map ``(N, C, H, W)`` to ``(N, D, H/stride, W/stride)``."""
        output: Tensor = self.bn1(self.conv(features))
        return output + features if self.has_skip else output

    def receptive_field(self, field: ReceptiveField) -> ReceptiveField:
        """Return the field after this block."""
        return _after(field, self.conv)


class DepthwiseSeparable(nn.Module):
    """Depthwise, squeeze-and-excitation, pointwise: the inverted residual without expansion."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: int,
        *,
        style: ConvStyle,
        stride: int = 1,
        dilation: int = 1,
        se_channels: int = 0,
        skip: bool = True,
        pointwise_activation: bool = False,
    ) -> None:
        super().__init__()
        self.has_skip = skip and stride == 1 and in_channels == out_channels
        self.conv_dw = conv2d(
            in_channels,
            in_channels,
            kernel,
            stride=stride,
            dilation=dilation,
            groups=in_channels,
            padding=style.padding,
        )
        self.bn1 = BatchNormAct2d(in_channels, style)
        self.se = _squeeze_excite(in_channels, se_channels, style)
        self.conv_pw = conv2d(in_channels, out_channels, 1)
        self.bn2 = BatchNormAct2d(out_channels, style, activate=pointwise_activation)

    def forward(self, features: Tensor) -> Tensor:
        """Map ``(N, C, H, W)`` to ``(N, D, H/stride, W/stride)``."""
        output = self.se(self.bn1(self.conv_dw(features)))
        projected: Tensor = self.bn2(self.conv_pw(output))
        return projected + features if self.has_skip else projected

    def receptive_field(self, field: ReceptiveField) -> ReceptiveField:
        """Return the field after this block."""
        return _after(field, self.conv_dw, self.se)


class InvertedResidual(nn.Module):
    """Pointwise expansion to ``mid_channels``, depthwise, squeeze-and-excitation, pointwise projection."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: int,
        *,
        mid_channels: int,
        style: ConvStyle,
        stride: int = 1,
        dilation: int = 1,
        se_channels: int = 0,
        skip: bool = True,
    ) -> None:
        super().__init__()
        self.has_skip = skip and stride == 1 and in_channels == out_channels
        self.conv_pw = conv2d(in_channels, mid_channels, 1)
        self.bn1 = BatchNormAct2d(mid_channels, style)
        self.conv_dw = conv2d(
            mid_channels,
            mid_channels,
            kernel,
            stride=stride,
            dilation=dilation,
            groups=mid_channels,
            padding=style.padding,
        )
        self.bn2 = BatchNormAct2d(mid_channels, style)
        self.se = _squeeze_excite(mid_channels, se_channels, style)
        self.conv_pwl = conv2d(mid_channels, out_channels, 1)
        self.bn3 = BatchNormAct2d(out_channels, style, activate=False)

    def forward(self, features: Tensor) -> Tensor:
        """Map ``(N, C, H, W)`` to ``(N, D, H/stride, W/stride)``."""
        output = self.bn1(self.conv_pw(features))
        output = self.se(self.bn2(self.conv_dw(output)))
        projected: Tensor = self.bn3(self.conv_pwl(output))
        return projected + features if self.has_skip else projected

    def receptive_field(self, field: ReceptiveField) -> ReceptiveField:
        """Return the field after this block."""
        return _after(field, self.conv_dw, self.se)


class EdgeResidual(nn.Module):
    """The fused inverted residual: a full convolution to ``mid_channels``, then a pointwise projection."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: int,
        *,
        mid_channels: int,
        style: ConvStyle,
        stride: int = 1,
        dilation: int = 1,
        se_channels: int = 0,
        skip: bool = True,
    ) -> None:
        super().__init__()
        self.has_skip = skip and stride == 1 and in_channels == out_channels
        self.conv_exp = conv2d(
            in_channels, mid_channels, kernel, stride=stride, dilation=dilation, padding=style.padding
        )
        self.bn1 = BatchNormAct2d(mid_channels, style)
        self.se = _squeeze_excite(mid_channels, se_channels, style)
        self.conv_pwl = conv2d(mid_channels, out_channels, 1)
        self.bn2 = BatchNormAct2d(out_channels, style, activate=False)

    def forward(self, features: Tensor) -> Tensor:
        """Map ``(N, C, H, W)`` to ``(N, D, H/stride, W/stride)``."""
        output = self.se(self.bn1(self.conv_exp(features)))
        projected: Tensor = self.bn2(self.conv_pwl(output))
        return projected + features if self.has_skip else projected

    def receptive_field(self, field: ReceptiveField) -> ReceptiveField:
        """Return the field after this block."""
        return _after(field, self.conv_exp, self.se)


def _after(field: ReceptiveField, conv: nn.Conv2d, se: nn.Module | None = None) -> ReceptiveField:
    field = field.conv(conv.kernel_size[0], conv.stride[0], conv.dilation[0])
    return field.everywhere() if isinstance(se, SqueezeExcite) else field


def make_divisible(channels: float, divisor: int = 8, round_limit: float = 0.9) -> int:
    """Return the nearest multiple of ``divisor`` that is not below ``round_limit`` of ``channels``."""
    rounded = max(divisor, int(channels + divisor / 2) // divisor * divisor)
    return rounded + divisor if rounded < round_limit * channels else rounded


def init_weights(model: nn.Module) -> None:
    """TensorFlow's initialisation of these networks: normal by fan-out, uniform in the classifier."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            fan_out = module.kernel_size[0] * module.kernel_size[1] * module.out_channels // module.groups
            nn.init.normal_(module.weight, 0.0, (2.0 / fan_out) ** 0.5)
        elif isinstance(module, nn.Linear):
            bound = module.out_features**-0.5
            nn.init.uniform_(module.weight, -bound, bound)
        else:
            continue
        if module.bias is not None:
            nn.init.zeros_(module.bias)
