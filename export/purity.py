"""Refuse a network that does not give the same numbers twice: an engine of it would compute something else."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import GraphModule, Node
from torch.utils.hooks import RemovableHandle

from deploykit.backbones.base import BaseBackbone
from deploykit.backbones.inference_copy import example_images
from deploykit.backbones.random_state import kept_random_states, random_states, same_states
from deploykit.errors import ExportError
from deploykit.fusion.constants import argument, operand
from deploykit.fusion.locate import describe_node, module_path
from deploykit.parity.metrics import sqnr_db
from deploykit.spec import Fp32

_aten = torch.ops.aten
_REMEDY = "An engine could only freeze one draw. Fix: switch it off in eval mode, as training=self.training does."
_DRAWS = 16
"""How many seeds are tried where the network draws random numbers outside the graph: a rare branch needs luck."""
_TOGETHER = 4
"""How many images are compared with each of them alone, at most: a large batch takes long."""

_DROPOUTS = ("dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout", "native_dropout")


def check_no_random_operators(module: GraphModule) -> None:
    """Refuse a traced graph whose outputs depend on a random operator.

    Raises:
        ExportError: names each operator and where it stands.
    """
    found = [describe_node(node) for node in _nodes_of_outputs(module) if _is_random(node)]
    if found:
        raise ExportError(
            f"the network is random in eval mode, by {'; '.join(dict.fromkeys(found))}. Its outputs differ from call "
            f"to call. {_REMEDY}"
        )


def check_no_batch_statistics(program: ExportedProgram) -> None:
    """Refuse a traced program in which an image's outputs depend on the other images of its batch.

    Weights that are normalised as they are read, as in NFNets, are the same for all images.

    Raises:
        ExportError: names each normalization and where it stands.
    """
    found = [
        describe_node(node)
        for node in _nodes_of_outputs(program.graph_module)
        if node.target == _aten.batch_norm.default
        and argument(node, 5, "training", False)
        and not _is_of_weights(operand(node, 0), program)
    ]
    if found:
        raise ExportError(
            f"the network normalises by the statistics of each batch in eval mode, by {'; '.join(found)}. What an "
            "image gives then depends on the others of its batch. Fix: use running statistics "
            "(track_running_stats=True, and no train() inside forward), or nn.InstanceNorm2d."
        )


def check_repeatable(backbone: BaseBackbone) -> None:
    """Run a backbone again with other seeds, and refuse it where the outputs differ.

    It finds what a graph does not show: numbers drawn by Python or NumPy, and a state kept between calls.

    Args:
        backbone: from `inference_copy`; only its own state may change.

    Raises:
        ExportError: the outputs differ; names the first submodule whose numbers do.
    """
    images = example_images(backbone)
    first, drew = _run(backbone, images, seed=0)
    for seed in range(1, _DRAWS if drew else 2):
        again, _ = _run(backbone, images, seed=seed)
        if not _agree(first, again):
            raise ExportError(
                f"{backbone.name} does not give the same twice for the same images in eval mode: its outputs differ "
                f"from call to call, first {_first_difference(backbone, images, seed)}. It draws random numbers, or "
                f"keeps a state between calls. {_REMEDY}"
            )


def check_images_apart(backbone: BaseBackbone, batch: int) -> None:
    """Run images together and alone, and refuse a backbone that gives an image something else beside others.

    Args:
        backbone: from `inference_copy`; only its own state may change.
        batch: how many images run together, at least 2; of more than four, four are.

    Raises:
        ExportError: the outputs differ.
    """
    batch = min(batch, _TOGETHER)
    images = example_images(backbone, batch)
    together, _ = _run(backbone, images, seed=0)
    for position in (0, batch - 1):
        alone, _ = _run(backbone, images[position : position + 1], seed=0)
        if not _agree(alone, [output[position : position + 1] for output in together]):
            raise ExportError(
                f"what {backbone.name} gives for an image depends on the others of its batch: image {position} of "
                f"{batch} has other outputs than alone. Fix: compute each image by itself in forward (no mean, sort or "
                "index over dimension 0, and nothing by the batch's size), or ask for batch_size=1."
            )


def _nodes_of_outputs(module: GraphModule) -> Iterator[Node]:
    """Yield every call that an output depends on, those of subgraphs included."""
    needed: set[Node] = set()
    pending = [node for node in module.graph.nodes if node.op == "output"]
    while pending:
        node = pending.pop()
        if node not in needed:
            needed.add(node)
            pending.extend(node.all_input_nodes)
    for node in module.graph.nodes:
        if node not in needed:
            continue
        if node.op == "call_function":
            yield node
        elif node.op == "get_attr" and isinstance(part := getattr(module, str(node.target), None), GraphModule):
            yield from _nodes_of_outputs(part)


def _is_of_weights(node: Node, program: ExportedProgram) -> bool:
    """Return whether a value of the program's own graph comes from parameters, buffers and constants alone."""
    signature = program.graph_signature
    tables = (signature.inputs_to_parameters, signature.inputs_to_buffers, signature.inputs_to_lifted_tensor_constants)
    weights = {name for table in tables for name in table}
    seen: set[Node] = set()
    pending = [node]
    while pending:
        node = pending.pop()
        if node.op == "placeholder" and node.name not in weights:
            return False
        if node not in seen:
            seen.add(node)
            pending.extend(node.all_input_nodes)
    return True


def _is_random(node: Node) -> bool:
    """Return whether a call draws random numbers with the arguments that it has."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload) or torch.Tag.nondeterministic_seeded not in target.tags:
        return False
    name = target._schema.name.removeprefix("aten::").rstrip("_")
    if name in _DROPOUTS:
        return bool(argument(node, 2, "train", True)) and 0 < float(argument(node, 1, "p", 0.5)) < 1
    names = [each.name for each in target._schema.arguments]
    arguments = {each: argument(node, position, each, None) for position, each in enumerate(names)}
    if "dropout_p" in arguments or "dropout" in arguments:  # attention, and layers of recurrent networks
        probability = arguments.get("dropout_p", arguments.get("dropout"))
        return bool(probability) and arguments.get("train", True) is not False
    return not (name.startswith("rrelu") and not arguments.get("training"))


def _run(backbone: BaseBackbone, images: Tensor, seed: int) -> tuple[list[Tensor], bool]:
    """Return what a backbone gives, and whether it drew random numbers; the caller's generators stay as they were."""
    with kept_random_states(seed), torch.no_grad():
        before = random_states()
        outputs = list(backbone.forward_everything(images.clone()).values())
        return outputs, not same_states(before, random_states())


def _agree(one: list[Tensor], other: list[Tensor]) -> bool:
    """Return whether outputs are equal but for the order of additions, which threads may change."""
    if [output.shape for output in one] != [output.shape for output in other]:
        return False
    budget = Fp32().min_sqnr_db
    return all(sqnr_db(left.numpy(), right.numpy()) >= budget for left, right in zip(one, other, strict=True))


def _first_difference(backbone: BaseBackbone, images: Tensor, seed: int) -> str:
    """Return where two runs part: in a submodule, or before it in the code of its parent."""
    one, other = (_events(backbone, images, each) for each in (0, seed))
    for (path, what, value), (_, _, again) in zip(one, other, strict=False):
        if value != again and path:
            return f"inside {path!r}" if what == "output" else f"in what {path!r} is called with"
    return "in its own forward"


def _events(backbone: BaseBackbone, images: Tensor, seed: int) -> list[tuple[str, str, float]]:
    """Return a number for the input and the output of each submodule, in the order in which they run."""
    events: list[tuple[str, str, float]] = []

    def note(path: str, what: str, value: object) -> None:
        tensors = [each for each in (value if isinstance(value, tuple) else (value,)) if isinstance(each, Tensor)]
        events.append((path, what, sum(float(each.double().abs().sum()) for each in tensors)))

    with ExitStack() as hooks:
        for path, part in backbone.named_modules():
            for handle in _watch(part, module_path(path), note):
                hooks.callback(handle.remove)
        _run(backbone, images, seed)
    return events


def _watch(
    part: nn.Module, path: str, note: Callable[[str, str, object], None]
) -> tuple[RemovableHandle, RemovableHandle]:
    return (
        part.register_forward_pre_hook(lambda module, inputs: note(path, "input", inputs)),
        part.register_forward_hook(lambda module, inputs, output: note(path, "output", output)),
    )
