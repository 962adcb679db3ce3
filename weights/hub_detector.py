"""A detector with `from_pretrained`, `save_pretrained` and `push_to_hub` of `huggingface_hub`.

Import it where that package is installed (`pip install '.[huggingface]'`); nothing else here needs it.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, PyTorchModelHubMixin, snapshot_download
from torch import Tensor, nn

from models.detector import Detector
from models.post_process import PostProcess
from util.errors import UserError
from weights.build import build_detector, options_for
from weights.checkpoint_file import read_checkpoint
from weights.model_card import LIBRARY_NAME, TAGS, TASK, model_card
from weights.safetensors_file import CONFIG_NAME, WEIGHTS_NAME
from weights.save_pretrained import ShareOptions, write_pretrained


class PretrainedDetector(
    nn.Module, PyTorchModelHubMixin, library_name=LIBRARY_NAME, pipeline_tag=TASK, tags=list(TAGS)
):
    """A detector of any widths and what its weights do not say.

    Attributes:
        detector: the detector, in eval mode on the CPU when it was read.
        postprocess: turns its outputs into detections, see `models.post_process.PostProcess`.
        options: its network, categories and image size.
    """

    def __init__(self, detector: Detector, postprocess: PostProcess, options: ShareOptions) -> None:
        super().__init__()
        self.detector, self.postprocess, self.options = detector, postprocess, options

    @property
    def categories(self) -> dict[int, str]:
        """Category names by id, empty if the file has none."""
        return dict(self.options.detector.categories or {})

    @classmethod
    def from_checkpoint(cls, path: str | Path) -> PretrainedDetector:
        """Read a checkpoint of any format; the output of a search is cut. A leading `~` is the home folder.

        Raises:
            UserError: it cannot be read.
        """
        checkpoint = read_checkpoint(os.path.expanduser(path))
        options = options_for(ShareOptions(), checkpoint).with_values({"categories": checkpoint.categories})
        detector, _, postprocessors = build_detector(options.detector, checkpoint)
        return cls(detector, postprocessors["bbox"], options).eval()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **download: Any) -> PretrainedDetector:
        """Read a folder of `save_pretrained`, or a model of the Hub such as `user/name`.

        Only safetensors and JSON are read, so no code in them runs. The Hub is asked for `user/name` unless `user` is a
        file or folder here; anything else is a folder, in which a leading `~` is the home folder.

        Args:
            download: `revision`, `token`, `cache_dir`, `force_download` and `local_files_only`, for the Hub.

        Raises:
            UserError: the folder or a file is missing, or a file is damaged.
        """
        folder = os.path.expanduser(pretrained_model_name_or_path)
        if not os.path.isdir(folder):
            if not _can_be_on_hub(pretrained_model_name_or_path):
                raise UserError(
                    f"{folder}: found no such folder, expected one of save_pretrained, or a model of the Hub such as "
                    "user/name"
                )
            folder = snapshot_download(str(folder), allow_patterns=[CONFIG_NAME, WEIGHTS_NAME], **download)
        return cls.from_checkpoint(Path(folder) / WEIGHTS_NAME)

    def forward(self, images: list[Tensor] | Tensor) -> dict[str, Any]:
        """Detect objects; see `models.detector.Detector.forward`."""
        return self.detector(images)

    def generate_model_card(self, *args: Any, **kwargs: Any) -> ModelCard:
        """Return a card without a run's results, which `python -m weights.save_pretrained` adds."""
        return ModelCard(self._card(""))

    def _card(self, title: str) -> str:
        return model_card(title, self.detector, self.options.detector, self.options.loader.image_size)

    def _save_pretrained(self, save_directory: Path) -> None:
        write_pretrained(save_directory, self.detector, self.options, self._card(save_directory.name))


def _can_be_on_hub(name: str | Path) -> bool:
    """Return whether a text is a user and a name, and not a path that exists in part."""
    if not isinstance(name, str) or "\\" in name or name.startswith((".", "~")):
        return False
    user, *rest = name.split("/")
    return len(rest) == 1 and user != "" and rest[0] != "" and not os.path.exists(user)
