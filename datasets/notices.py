"""What a run logs about its data before the first pass: what cannot be learnt, measured or found."""

from datasets.boxes import measured_box_notices, query_notices, training_box_notices
from datasets.coco import CocoDataset
from datasets.sizes import header_notices
from util.logging import Notice


def training_notices(dataset: CocoDataset, num_queries: int) -> list[Notice]:
    """Notices about data that a detector with so many queries is trained on."""
    file = dataset.annotation_file
    return [*training_box_notices(file), *query_notices(file, num_queries), *header_notices(dataset)]


def measured_notices(dataset: CocoDataset, num_queries: int) -> list[Notice]:
    """Notices about data that the AP of a detector with so many queries is measured on."""
    file = dataset.annotation_file
    return [*measured_box_notices(file), *query_notices(file, num_queries), *header_notices(dataset)]
