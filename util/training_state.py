"""All that training needs to go on exactly where it stopped: optimizer, schedule, averages, random generators."""

import argparse
import math
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn

from util import distributed
from util.ema import WeightAverage
from util.errors import UserError


class TrainingState:
    """Optimizer, schedule and the rest of the state of one training run.

    Args:
        model: the detector, on its device, not wrapped.
        args: reads lr, lr_backbone, weight_decay, lr_schedule, lr_drop, warmup_iters, epochs, amp, ema_decay, seed.
        steps_per_epoch: optimizer steps.

    Attributes:
        epoch: epochs done.
        best_ap: best AP so far; minus infinity before the first, for AP is -1 where val2017 has no boxes.
    """

    def __init__(self, model: nn.Module, args: argparse.Namespace, steps_per_epoch: int) -> None:
        self.model = model
        self.args = args
        groups = parameter_groups(model, args.lr, args.lr_backbone)
        self.optimizer = torch.optim.AdamW(groups, lr=args.lr, weight_decay=args.weight_decay, fused=True)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, schedule(args, steps_per_epoch))
        self.scaler = torch.amp.GradScaler(next(model.parameters()).device.type) if args.amp == "fp16" else None
        self.weight_average = WeightAverage(model, args.ema_decay) if args.ema_decay > 0 else None
        self.epoch = 0
        self.best_ap = -math.inf

    @property
    def best_model(self) -> nn.Module:
        """The model to evaluate and to keep: the averaged one where there is one."""
        return self.model if self.weight_average is None else self.weight_average.model

    def generators(self) -> dict[str, Any]:
        """State of every random generator of this process, of types that weights-only loading takes."""
        name, keys, *rest = np.random.get_state()
        return {
            "python": random.getstate(),
            "numpy": [name, torch.from_numpy(keys.astype(np.int64)), *rest],
            "torch": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None,
        }

    def state_dict(self) -> dict[str, Any]:
        """Entries of a training checkpoint beside weights and arguments; call it in every process."""
        state = {
            "optimizer": self.optimizer.state_dict(),
            "lr_scheduler": {"last_epoch": self.scheduler.last_epoch},
            "epoch": self.epoch,
            "generators": distributed.gather_objects(self.generators()),
            "scaler": None if self.scaler is None else self.scaler.state_dict(),
            "best_ap": self.best_ap,
        }
        if self.weight_average is not None:
            # The checkpoint's `model` holds the averaged weights, so the ones under training are kept here.
            state["raw_model"] = self.model.state_dict()
            state["average_steps"] = self.weight_average.steps
        return state

    def load(self, state: dict[str, Any], averaged: dict[str, torch.Tensor], source: str) -> None:
        """Go on from `state_dict()`; the model must already hold the checkpoint's weights.

        Options of the optimizer that differ from the checkpoint's (they were typed) win over it.

        Raises:
            UserError: an entry is missing or does not fit.
        """
        try:
            self._load(state, averaged)
        except (LookupError, ValueError, TypeError, RuntimeError, ArithmeticError, AttributeError) as error:
            raise UserError(
                f"{source}: its training state does not fit this run ({type(error).__name__}: "
                f"{str(error).splitlines()[0] if str(error) else ''}), expected one written with the same options; "
                "--start_fresh takes the weights alone"
            ) from None

    def _load(self, state: dict[str, Any], averaged: dict[str, torch.Tensor]) -> None:
        wanted = [{k: v for k, v in group.items() if k != "params"} for group in self.optimizer.param_groups]
        self.optimizer.load_state_dict(state["optimizer"])
        self._check_moments()
        self.scheduler.last_epoch = state["lr_scheduler"]["last_epoch"]
        factor = self.scheduler.lr_lambdas[0](self.scheduler.last_epoch)
        for group, own in zip(self.optimizer.param_groups, wanted, strict=True):
            group.update(own, lr=own["initial_lr"] * factor)
        if self.weight_average is not None and "raw_model" in state:
            self.weight_average.load_state_dict({"model": averaged, "steps": state["average_steps"]})
        if "raw_model" in state:
            self.model.load_state_dict(state["raw_model"])
        if self.scaler is not None and state["scaler"] is not None:
            self.scaler.load_state_dict(state["scaler"])
        self.epoch = state["epoch"]
        self.best_ap = state["best_ap"]
        if len(state["generators"]) == distributed.world_size():
            self._set_generators(state["generators"][distributed.rank()])

    def _check_moments(self) -> None:
        for parameter, moments in self.optimizer.state.items():
            for name in ("exp_avg", "exp_avg_sq"):
                if moments[name].shape != parameter.shape or not moments[name].is_floating_point():
                    raise ValueError(f"{name} of the shape {tuple(moments[name].shape)}, not {tuple(parameter.shape)}")
            if moments["step"].shape != () or not math.isfinite(moments["step"]):
                raise ValueError("a step that is no number")

    def _set_generators(self, state: dict[str, Any]) -> None:
        version, internal, gauss = state["python"]
        random.setstate((version, tuple(internal), gauss))
        name, keys, *rest = state["numpy"]
        np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
        torch.set_rng_state(state["torch"])
        if state["cuda"] is not None and torch.cuda.is_available():
            torch.cuda.set_rng_state(state["cuda"])


def parameter_groups(model: nn.Module, lr: float, lr_backbone: float) -> list[dict[str, Any]]:
    """Trainable parameters in two groups: transformer and heads, and the backbone with its own learning rate."""
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    return [
        {"params": [p for name, p in named if not name.startswith("backbone.")], "lr": lr},
        {"params": [p for name, p in named if name.startswith("backbone.")], "lr": lr_backbone},
    ]


def schedule(args: argparse.Namespace, steps_per_epoch: int) -> Callable[[int], float]:
    """Factor of the learning rates by optimizer step: linear warm-up, then a drop to 1/10 or a half cosine to 0."""

    def factor(step: int) -> float:
        if step < args.warmup_iters:
            return (step + 1) / args.warmup_iters
        if args.lr_schedule == "step":
            return 0.1 ** (step // steps_per_epoch // args.lr_drop)
        length = max(1, args.epochs * steps_per_epoch - args.warmup_iters)
        return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - args.warmup_iters) / length)))

    return factor


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and torch, differently in each process."""
    seed += distributed.rank()
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
