"""Random weights that hide no errors: what starts at zero or one is drawn from ranges that training gives."""

import torch
from torch import nn

_NORMS = (nn.modules.batchnorm._BatchNorm, nn.GroupNorm, nn.LayerNorm)


@torch.no_grad()
def randomize(model: nn.Module, seed: int = 0) -> nn.Module:
    """Draw norm layers, layer scales and all other constant parameters of ``model`` in place.

    Norm weights and running variances come from U(0.5, 1.5), norm biases and running means from
    N(0, 0.1); other constant parameters from U(0.1, 0.5) where they are 1-D scales and from
    N(0, 0.02) otherwise. The order of draws is that of ``named_modules``.
    """
    generator = torch.Generator().manual_seed(seed)
    in_norms = set()
    for module in model.modules():
        if isinstance(module, _NORMS):
            _randomize_norm(module, generator)
            in_norms.update(id(parameter) for parameter in module.parameters(recurse=False))
    for name, parameter in model.named_parameters():
        if id(parameter) in in_norms or parameter.numel() < 2 or parameter.min() != parameter.max():
            continue
        if parameter.dim() == 1 and "bias" not in name.rpartition(".")[2]:
            parameter.uniform_(0.1, 0.5, generator=generator)
        else:
            parameter.normal_(0.0, 0.02, generator=generator)
    return model


@torch.no_grad()
def settle(model: nn.Module, images: torch.Tensor) -> nn.Module:
    """Let the statistics of all BatchNorms of ``model`` be those of ``images``, as training leaves them, in place.

    With drawn ones a deep network's values grow from block to block, until rounding alone switches its gates:
    of EfficientNetV2-S at 72 pixels, torch's FP32 keeps 2 dB of its own double precision.
    """
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    training = model.training
    model.train()
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the mean over all that is seen
    model(images)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    return model.train(training)


def _randomize_norm(norm: nn.Module, generator: torch.Generator) -> None:
    if norm.weight is not None:
        norm.weight.uniform_(0.5, 1.5, generator=generator)
    if norm.bias is not None:
        norm.bias.normal_(0.0, 0.1, generator=generator)
    if getattr(norm, "running_var", None) is not None:
        norm.running_mean.normal_(0.0, 0.1, generator=generator)
        norm.running_var.uniform_(0.5, 1.5, generator=generator)
