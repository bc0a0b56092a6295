"""MobileNetV4's block: Qin et al. 2024, "MobileNetV4: Universal Models for the Mobile Ecosystem", section 4."""

from __future__ import annotations

from torch import Tensor, nn

from deploykit.backbones.features import ReceptiveField
from deploykit.backbones.inverted_residual import BatchNormAct2d, ConvStyle, conv2d


class ConvNorm(nn.Module):
    """Convolution and norm, with the activation where ``activate`` is set; depthwise when ``groups`` says so."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: int,
        *,
        style: ConvStyle,
        stride: int = 1,
        dilation: int = 1,
        groups: int = 1,
        activate: bool = True,
    ) -> None:
        super().__init__()
        self.conv = conv2d(
            in_channels,
            out_channels,
            kernel,
            stride=stride,
            dilation=dilation,
            groups=groups,
            padding=style.padding,
        )
        self.bn = BatchNormAct2d(out_channels, style, activate=activate)

    def forward(self, features: Tensor) -> Tensor:
        """Map ``(N, C, H, W)`` to ``(N, D, H/stride, W/stride)``."""
        output: Tensor = self.bn(self.conv(features))
        return output


class UniversalInvertedResidual(nn.Module):
    """The inverted residual with a depthwise convolution before the expansion, inside it, both or neither.

    ``start_kernel`` and ``kernel`` are those of the two depthwise convolutions; 0 leaves one out.
    The stride is on the inner one where there is one, otherwise on the first.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: int,
        *,
        start_kernel: int,
        mid_channels: int,
        style: ConvStyle,
        stride: int = 1,
        dilation: int = 1,
    ) -> None:
        super().__init__()
        self.has_skip = stride == 1 and in_channels == out_channels
        self.dw_start = (
            ConvNorm(
                in_channels,
                in_channels,
                start_kernel,
                style=style,
                stride=1 if kernel else stride,
                dilation=dilation,
                groups=in_channels,
                activate=False,
            )
            if start_kernel
            else nn.Identity()
        )
        self.pw_exp = ConvNorm(in_channels, mid_channels, 1, style=style)
        self.dw_mid = (
            ConvNorm(
                mid_channels, mid_channels, kernel, style=style, stride=stride, dilation=dilation, groups=mid_channels
            )
            if kernel
            else nn.Identity()
        )
        self.pw_proj = ConvNorm(mid_channels, out_channels, 1, style=style, activate=False)

    def forward(self, features: Tensor) -> Tensor:
        """Map ``(N, C, H, W)`` to ``(N, D, H/stride, W/stride)``."""
        output: Tensor = self.pw_proj(self.dw_mid(self.pw_exp(self.dw_start(features))))
        return output + features if self.has_skip else output

    def receptive_field(self, field: ReceptiveField) -> ReceptiveField:
        """Return the field after this block."""
        for depthwise in (self.dw_start, self.dw_mid):
            if isinstance(depthwise, ConvNorm):
                conv = depthwise.conv
                field = field.conv(conv.kernel_size[0], conv.stride[0], conv.dilation[0])
        return field
