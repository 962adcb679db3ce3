"""What a figure was measured with, for the JSON files that benchmarks leave."""

from util.environment import environment

__all__ = ["environment"]
