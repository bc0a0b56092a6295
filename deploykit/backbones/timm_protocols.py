"""What deploykit calls of timm, whose own types do not go through `require`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, Protocol, TypedDict, overload

from torch import Tensor, nn

from deploykit.spec import CropMode, Interpolation


class LevelInfo(TypedDict):
    """An entry of a model's ``feature_info``: channels, stride, and the module that gives the map."""

    num_chs: int
    reduction: int
    module: str


class DataConfig(TypedDict):
    """What ``resolve_model_data_config`` gives; ``input_size`` is (C, H, W)."""

    input_size: tuple[int, int, int]
    mean: Sequence[float]
    std: Sequence[float]
    interpolation: Interpolation
    crop_pct: float
    crop_mode: CropMode


class TimmConfig(Protocol):
    """``timm.models.PretrainedCfg``."""

    num_classes: int
    fixed_input_size: bool


class TimmData(Protocol):
    """The module ``timm.data``."""

    def resolve_model_data_config(self, model: nn.Module) -> DataConfig:
        """Return how a model's weights expect images."""
        ...


class TimmModule(Protocol):
    """A model of timm."""

    def forward_features(self, images: Tensor) -> Tensor:
        """Run all but the head."""
        ...

    def forward_head(self, trunk: Tensor) -> Tensor:
        """Pool and classify."""
        ...

    @overload
    def forward_intermediates(
        self, images: Tensor, *, indices: Sequence[int], output_fmt: str
    ) -> tuple[Tensor, list[Tensor]]: ...
    @overload
    def forward_intermediates(
        self,
        images: Tensor,
        *,
        indices: Sequence[int],
        stop_early: bool,
        intermediates_only: Literal[True],
        output_fmt: str,
    ) -> list[Tensor]: ...

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Compute activations again in the backward pass."""
        ...


class TimmPackage(Protocol):
    """The module timm."""

    __version__: str
    data: TimmData

    def is_model(self, name: str) -> bool:
        """Return whether there is such an architecture."""
        ...

    def list_models(self) -> list[str]:
        """Return every architecture."""
        ...

    def list_pretrained(self, pattern: str) -> list[str]:
        """Return names with the tags of their weights."""
        ...

    def get_pretrained_cfg(self, name: str) -> TimmConfig | None:
        """Return what timm knows of some weights."""
        ...

    def create_model(self, **arguments: object) -> nn.Module:
        """Build a model."""
        ...


def pretrained_config(model: nn.Module) -> Mapping[str, object]:
    """Return the ``pretrained_cfg`` that timm gives each model that it builds."""
    config = model.pretrained_cfg
    assert isinstance(config, Mapping)  # noqa: S101  (timm makes it a dict)
    return config
