"""The outputs at which a search measures how the loss reacts to errors."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from models.prunable import PrunableModule
from models.residual import BLOCK


def outputs_of(module: PrunableModule) -> dict[str, str]:
    """Return the layers at whose output a module's sensitivity is measured, by key of `Calibration.sensitivities`."""
    if module.kind != BLOCK:
        return {module.name: module.output_name}
    prefix = module.output_name.rpartition(".")[0]
    return {f"{module.name}.bn{number}": f"{prefix}.bn{number}" for number in range(1, len(module.parts) + 2)}


@contextmanager
def kept_outputs(model: nn.Module, modules: Iterable[PrunableModule]) -> Iterator[dict[str, Tensor]]:
    """Keep the outputs of `outputs_of` these modules in the yielded dict, by key, whenever the model runs."""
    outputs: dict[str, Tensor] = {}

    def keep(key: str, output: Tensor) -> Tensor:
        outputs[key] = output
        return output.clone()  # what follows may change it in place

    hooks = [
        model.get_submodule(name).register_forward_hook(lambda _, inputs, output, key=key: keep(key, output))
        for module in modules
        for key, name in outputs_of(module).items()
    ]
    try:
        yield outputs
    finally:
        for hook in hooks:
            hook.remove()
