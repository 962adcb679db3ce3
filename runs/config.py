"""Options of a run, and the groups of options that main.py and a search are made of."""

from __future__ import annotations

import os
from dataclasses import dataclass

from datasets.config import DataConfig
from datasets.transforms import TRAINING_TRANSFORMS
from models.config import NETWORK_TITLE, DenoisingConfig, DetectorConfig, LossConfig, TrainedDetectorConfig
from models.distillation import QUERIES
from pruning.config import PRECISIONS, SearchConfig
from pruning.queries import QUERY_IMAGES
from util.cli import Config, group, option, real, whole
from util.learning_rate import SCHEDULES

DECAYED = ("all", "matrices")


@dataclass(frozen=True)
class FolderConfig(Config):
    """Output folder and checkpoint of a script."""

    output_dir: str = option("output/run", type=os.path.expanduser, metavar="FOLDER", stored="run", help="for "
        "checkpoints, results, logs and report.html (`python -m reports FOLDER` rewrites it)")  # fmt: skip
    resume: str | None = option(None, type=os.path.expanduser, metavar="FILE", stored="run", help="checkpoint to start "
        "from, of any format the README lists")  # fmt: skip
    plan: bool = option(False, stored="run", help="print how long the run will take, what it needs and what would make "
        "it faster, from a few timed images; write nothing")  # fmt: skip


@dataclass(frozen=True)
class DeviceConfig(FolderConfig):
    """Output folder, checkpoint and device."""

    device: str | None = option(None, "cpu, cuda or cuda:N, by default cuda if available", stored="run")


@dataclass(frozen=True)
class RunConfig(DeviceConfig):
    """Options of both training and search."""

    save_safetensors: bool = option(False, stored="run", help="write the weights of each checkpoint as .safetensors "
        "beside it; --resume reads both")  # fmt: skip
    keep_queries: int | None = option(None, type=whole(1), stored="run", help="keep the N matching queries of --resume "
        f"that find most objects in the first {QUERY_IMAGES} images of train2017 (a search: of its split)")  # fmt: skip
    seed: int = option(42, "seed of every random generator", type=whole(0, at_most=2**31))


@dataclass(frozen=True)
class MainConfig(RunConfig):
    """Options of main.py: how to use the checkpoint, and precision."""

    start_fresh: bool = option(False, stored="run", help="load only the weights of --resume, even if its training is "
        "unfinished")  # fmt: skip
    finetune_ignore: list[str] | None = option(None, nargs="+", metavar="KEY", stored="run", help="do not load the "
        "weights of --resume whose names contain one of these; initialise them")  # fmt: skip
    eval: bool = option(False, "evaluate on val2017 and stop", stored="run")
    ap_by_layer: bool = option(False, stored="run", help="with --eval, also print AP after each decoder layer; "
        "--dec_layers N then uses the first N")  # fmt: skip
    save_results: bool = option(False, "write the detections on val2017 as COCO results JSON", stored="run")
    amp: str = option("off", "mixed precision of training; --amp alone is bf16", **PRECISIONS)
    eval_amp: str = option("off", **PRECISIONS, help="mixed precision of evaluation, also during training; off is "
        "float32, regardless of --amp")  # fmt: skip


@dataclass(frozen=True)
class LogConfig(Config):
    """Logging besides run.log."""

    tensorboard: bool = option(False, "write losses, rates, AP and widths to OUTPUT_DIR/tensorboard", stored="run")


@dataclass(frozen=True)
class TrainingLogConfig(LogConfig):
    """Logging of a training run."""

    print_freq: int = option(100, type=whole(0), stored="run", help="training batches between log lines with "
        "losses, learning rate and time left; 0 for only a progress bar")  # fmt: skip


@dataclass(frozen=True)
class TrainingConfig(Config):
    """Epochs, learning rates and the optimizer."""

    augmentation: str = option("detr", choices=tuple(TRAINING_TRANSFORMS), help="training images: DETR's flips, "
        "scales and crops, or only flips at --image_size")  # fmt: skip
    epochs: int = option(50, "epochs", type=whole(1))
    lr: float = option(1e-4, "learning rate", type=real(0))
    lr_backbone: float = option(1e-5, type=real(0), help="learning rate of the backbone; 0 freezes it, including the "
        "statistics of its batch norms")  # fmt: skip
    lr_schedule: str = option("step", "step (drop to a tenth) or half cosine", choices=SCHEDULES)
    lr_drop: int = option(40, "epochs between the drops", type=whole(1))
    warmup_iters: int = option(0, "optimizer steps of linear warm-up", type=whole(0))
    weight_decay: float = option(1e-4, "weight decay of AdamW", type=real(0))
    weight_decay_on: str = option("all", choices=DECAYED, help="parameters that decay: all, or matrices, which "
        "leaves out norms, biases, embeddings and PReLU")  # fmt: skip
    clip_max_norm: float = option(0.1, "largest gradient norm, 0 for no clipping", type=real(0))
    accumulate: int = option(1, "batches per optimizer step", type=whole(1))
    ema_decay: float = option(0.0, "decay of the averaged weights, 0 for none", type=real(0, 1))
    eval_every: int = option(1, "epochs between evaluations", type=whole(1))
    patience: int = option(0, "stop after so many epochs without a better AP, 0 for never", type=whole(0))
    cache_images: bool = option(False, stored="run", help="decode all images to memory once, for small sets")


@dataclass(frozen=True)
class DistillationConfig(Config):
    """Distillation from a teacher."""

    distill: str | None = option(None, type=os.path.expanduser, metavar="TEACHER", help="train towards this detector's "
        "outputs too: checkpoint of the detector before pruning, not the output of a search, whose weights may "
        "differ from that detector's")  # fmt: skip
    distill_queries: list[str] | None = option(None, nargs="+", choices=tuple(QUERIES), help="queries whose outputs "
        "are compared: matching ones (default), denoising ones made of the same noise, and ones at random anchors or "
        "at the targets' boxes")  # fmt: skip
    distill_logits_coef: float = option(1, "weight of the loss on the teacher's logits", type=real(0))
    distill_boxes_coef: float = option(1, type=real(0), help="weight of the losses on the teacher's boxes, in "
        "units of --bbox_loss_coef and --giou_loss_coef")  # fmt: skip
    distill_memory_coef: float = option(1, "weight of the loss on the teacher's encoder output", type=real(0))


@dataclass(frozen=True)
class TrainingOptions(Config):
    """All options of main.py."""

    run: MainConfig = group(MainConfig, "run")
    data: DataConfig = group(DataConfig, "data")
    log: TrainingLogConfig = group(TrainingLogConfig, "log")
    detector: TrainedDetectorConfig = group(TrainedDetectorConfig, NETWORK_TITLE)
    denoising: DenoisingConfig = group(DenoisingConfig, "denoising and losses")
    losses: LossConfig = group(LossConfig, "denoising and losses")
    training: TrainingConfig = group(TrainingConfig, "training")
    distillation: DistillationConfig = group(DistillationConfig, "distillation")


@dataclass(frozen=True)
class SearchOptions(Config):
    """All options of a search."""

    run: RunConfig = group(RunConfig, "run")
    data: DataConfig = group(DataConfig, "data")
    log: LogConfig = group(LogConfig, "log")
    detector: DetectorConfig = group(DetectorConfig, NETWORK_TITLE)
    losses: LossConfig = group(LossConfig, "losses that channels are ranked by")
    search: SearchConfig = group(SearchConfig, "search")
