"""The deformable variant of DN-DETR."""
