"""The dense variant of DN-DETR."""
