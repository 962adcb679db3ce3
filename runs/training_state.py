"""State to resume training exactly: optimizer, schedule, averaged weights, random generators."""

import math
import random
from typing import Any

import numpy as np
import torch
from torch import nn

from datasets.config import SplitConfig
from runs.config import TrainingConfig, TrainingOptions
from util import distributed
from util.cli import options_of
from util.ema import WeightAverage
from util.errors import UserError, reason_of, shorten
from util.learning_rate import rate
from weights.formats import Checkpoint


class TrainingState:
    """Optimizer, schedule and the rest of the state of one training run.

    Args:
        model: the detector, on its device, not wrapped by DistributedDataParallel.
        training: all is used but augmentation, clip_max_norm and eval_every.
        steps_per_epoch: optimizer steps.
        train_images: images of the training set, for `resume_changes`.
        amp: mixed precision, a key of `engine.AMP_DTYPES`.

    Attributes:
        epoch: epochs done.
        batches: batches done by one process.
        warmup_epochs: length of the warm-up, which a resumed run keeps even if its steps per epoch differ.
        best_ap: best AP so far; minus infinity before the first, and if val2017 has no boxes.
        best_epoch, evaluated_epoch: epochs done at the best and at the last evaluation.
    """

    def __init__(
        self,
        model: nn.Module,
        training: TrainingConfig,
        steps_per_epoch: int,
        train_images: int | None = None,
        amp: str = "off",
    ) -> None:
        self.model = model
        self.training = training
        self.steps_per_epoch, self.train_images = steps_per_epoch, train_images
        self.warmup_epochs = training.warmup_iters / steps_per_epoch
        groups = parameter_groups(model, training.lr, training.lr_backbone, training.weight_decay_on)
        self.optimizer = torch.optim.AdamW(groups, lr=training.lr, weight_decay=training.weight_decay, fused=True)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, self.rate_factor)
        self.scaler = torch.amp.GradScaler(next(model.parameters()).device.type) if amp == "fp16" else None
        self.weight_average = WeightAverage(model, training.ema_decay) if training.ema_decay > 0 else None
        self.epoch, self.batches = 0, 0
        self.best_ap = -math.inf
        self.best_epoch, self.evaluated_epoch = 0, 0

    @property
    def best_model(self) -> nn.Module:
        """Model to evaluate and to save: the averaged one if there is one."""
        return self.model if self.weight_average is None else self.weight_average.model

    @property
    def is_stalled(self) -> bool:
        """Whether the last evaluation found no better AP for `--patience` epochs."""
        return 0 < self.training.patience <= self.evaluated_epoch - self.best_epoch

    def record_ap(self, ap: float) -> bool:
        """Record the AP of the epoch that was just done; return whether it is the best so far.

        If AP cannot be measured (-1), the last epoch counts as the best.
        """
        is_best = ap == -1 or ap > self.best_ap
        self.evaluated_epoch = self.epoch
        if is_best:
            self.best_epoch = self.epoch
        if is_best and ap != -1:
            self.best_ap = ap
        return is_best

    def rate_factor(self, step: int) -> float:
        """Return the learning rate factor at the middle of an optimizer step, counted from 0."""
        training = self.training
        fraction = (step + 0.5) / (self.steps_per_epoch * training.epochs)
        warmup, drop = self.warmup_epochs / training.epochs, training.lr_drop / training.epochs
        return rate(fraction, training.lr_schedule, warmup=warmup, drop=drop)

    def generators(self) -> dict[str, Any]:
        """Return the state of this process's random generators, in types that weights-only loading accepts."""
        state: Any = np.random.get_state()
        name, keys, *rest = state
        return {
            "python": random.getstate(),
            "numpy": [name, torch.from_numpy(keys.astype(np.int64)), *rest],
            "torch": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None,
        }

    def state_dict(self) -> dict[str, Any]:
        """Return a training checkpoint's entries besides weights and arguments; call it in every process."""
        state = {
            "optimizer": self.optimizer.state_dict(),
            "lr_scheduler": {
                "last_epoch": self.scheduler.last_epoch,
                "steps_per_epoch": self.steps_per_epoch,
                "warmup_iters": self.training.warmup_iters,
                "warmup_epochs": self.warmup_epochs,
            },
            "train_images": self.train_images,
            "epoch": self.epoch,
            "batches": self.batches,
            "generators": distributed.gather_objects(self.generators()),
            "scaler": None if self.scaler is None else self.scaler.state_dict(),
            "best_ap": self.best_ap,
            "best_epoch": self.best_epoch,
            "evaluated_epoch": self.evaluated_epoch,
        }
        if self.weight_average is not None:
            # The checkpoint's `model` holds the averaged weights; these are the trained ones.
            state["raw_model"] = self.model.state_dict()
            state["average_steps"] = self.weight_average.steps
        return state

    def load(self, state: dict[str, Any], averaged: dict[str, torch.Tensor], source: str) -> None:
        """Continue from `state_dict()`; the model must already hold the checkpoint's weights.

        Typed options of the optimizer override those in the checkpoint.

        Raises:
            UserError: an entry is missing or does not fit.
        """
        try:
            self._load(state, averaged)
        except (LookupError, ValueError, TypeError, RuntimeError, ArithmeticError, AttributeError) as error:
            raise UserError(
                f"{source}: its training state does not fit this run ({type(error).__name__}: "
                f"{reason_of(error)}), expected one written with the same options; "
                "--start_fresh loads only the weights"
            ) from None

    def _load(self, state: dict[str, Any], averaged: dict[str, torch.Tensor]) -> None:
        wanted = [{k: v for k, v in group.items() if k != "params"} for group in self.optimizer.param_groups]
        self.optimizer.load_state_dict(state["optimizer"])
        self._check_moments()
        self.epoch = state["epoch"]
        # Older versions did not count batches; take at least as many, so that no curve is cut.
        self.batches = state.get("batches", self.epoch * self.steps_per_epoch * self.training.accumulate)
        self.warmup_epochs = self._warmup_epochs_of(state["lr_scheduler"])
        self.scheduler.last_epoch = self.epoch * self.steps_per_epoch
        factor = self.rate_factor(self.scheduler.last_epoch)
        for group, own in zip(self.optimizer.param_groups, wanted, strict=True):
            group.update(own, lr=own["initial_lr"] * factor)
        if self.weight_average is not None and "raw_model" in state:
            self.weight_average.model.load_state_dict(averaged)
            self.weight_average.steps = state["average_steps"]
        if "raw_model" in state:
            self.model.load_state_dict(state["raw_model"])
        if self.scaler is not None and state["scaler"] is not None:
            self.scaler.load_state_dict(state["scaler"])
        self.best_ap = state["best_ap"]
        # Older versions did not record these: patience then counts from here.
        self.best_epoch, self.evaluated_epoch = (
            state.get(name, self.epoch) for name in ("best_epoch", "evaluated_epoch")
        )
        if len(state["generators"]) == distributed.world_size():
            self._set_generators(state["generators"][distributed.rank()])

    def _warmup_epochs_of(self, scheduler: dict[str, Any]) -> float:
        """Return the warm-up in epochs: the checkpoint's, unless --warmup_iters changed."""
        if scheduler.get("warmup_iters", self.training.warmup_iters) != self.training.warmup_iters:
            return self.warmup_epochs
        if "warmup_epochs" in scheduler:
            epochs = float(scheduler["warmup_epochs"])
        elif scheduler["last_epoch"]:
            epochs = self.training.warmup_iters * self.epoch / scheduler["last_epoch"]  # older versions
        else:
            epochs = self.warmup_epochs
        if not 0 <= epochs < math.inf:
            raise ValueError(f"a warm-up of {epochs} epochs")
        return epochs

    def _check_moments(self) -> None:
        for parameter, moments in self.optimizer.state.items():
            for name in ("exp_avg", "exp_avg_sq"):
                if moments[name].shape != parameter.shape or not moments[name].is_floating_point():
                    raise ValueError(f"{name} of the shape {tuple(moments[name].shape)}, not {tuple(parameter.shape)}")
            if moments["step"].shape != () or not math.isfinite(moments["step"]):
                raise ValueError("a step that is not a number")

    def _set_generators(self, state: dict[str, Any]) -> None:
        version, internal, gauss = state["python"]
        random.setstate((version, tuple(internal), gauss))
        name, keys, *rest = state["numpy"]
        np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
        torch.set_rng_state(state["torch"])
        if state["cuda"] is not None and torch.cuda.is_available():
            torch.cuda.set_rng_state(state["cuda"])


def parameter_groups(model: Any, lr: float, lr_backbone: float, decayed: str = "all") -> list[dict[str, Any]]:
    """Return parameter groups: transformer with heads, and backbone with its own learning rate.

    If not all parameters decay (`decayed` is matrices), the two groups have those that do. Two more groups of the same
    kind without weight decay follow.
    """
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    rest = [p for name, p in named if not name.startswith("backbone.")]
    backbone = model.backbone[0].trained_parameters()
    if decayed == "all":
        return [{"params": rest, "lr": lr}, {"params": backbone, "lr": lr_backbone}]
    kept_out = undecayed_parameters(model)
    groups: list[dict[str, Any]] = [
        {"params": [p for p in parameters if (p in kept_out) == without], "lr": rate}
        for without in (False, True)
        for parameters, rate in ((rest, lr), (backbone, lr_backbone))
    ]
    for group in groups[2:]:
        group["weight_decay"] = 0.0
    return groups


def undecayed_parameters(model: nn.Module) -> set[nn.Parameter]:
    """Return the vectors (norms, biases, PReLU) and the embeddings of a detector, which matrices do not include."""
    embeddings = {module.weight for module in model.modules() if isinstance(module, nn.Embedding)}
    return {
        parameter
        for name, parameter in model.named_parameters()
        if parameter.ndim < 2 or parameter in embeddings or name.endswith("level_embed")
    }


def resume_changes(checkpoint: Checkpoint, options: TrainingOptions, state: TrainingState) -> list[str]:
    """Return the differences between a training run and the one it continues, each as `name old -> new`.

    Args:
        checkpoint: of the run to continue.
        options: of the run that continues it.
        state: of the run that continues it, before or after loading.
    """
    stored, training = checkpoint.arguments, checkpoint.training or {}
    values, of_data = options.values(), options_of(SplitConfig) | {"coco_path": None}
    names = [
        name
        for name, field in options_of(TrainingOptions).items()
        if name in stored and name != "pretrained_backbone" and (field.metadata["stored"] != "run" or name in of_data)
    ]
    pairs = {f"--{name}": (stored[name], values[name]) for name in names}
    pairs["processes"] = (len(training["generators"]), distributed.world_size())
    if "train_images" in training:
        steps = training["lr_scheduler"]["steps_per_epoch"]
        pairs["training images"] = (training["train_images"], state.train_images)
        pairs["optimizer steps an epoch"] = (steps, state.steps_per_epoch)
    return [f"{name} {_shown(old)} -> {_shown(new)}" for name, (old, new) in pairs.items() if old != new]


def _shown(value: object) -> str:
    return shorten(value, 80).strip("'")


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and torch, differently in each process."""
    seed += distributed.rank()
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
