"""Messages that a run logs about its data before the first pass: what it cannot learn, measure or find."""

from datasets.boxes import measured_box_notices, query_notices, training_box_notices
from datasets.coco import CocoDataset
from datasets.sizes import header_notices
from util.logging import Notice


def training_notices(dataset: CocoDataset, num_queries: int) -> list[Notice]:
    """Return notices about the training data of a detector with `num_queries` queries."""
    file = dataset.annotation_file
    return [*training_box_notices(file), *query_notices(file, num_queries), *header_notices(dataset)]


def measured_notices(dataset: CocoDataset, num_queries: int) -> list[Notice]:
    """Return notices about the data that measures the AP of a detector with `num_queries` queries."""
    file = dataset.annotation_file
    return [*measured_box_notices(file), *query_notices(file, num_queries), *header_notices(dataset)]
