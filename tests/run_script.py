"""Run an entry script that knows `--backbone resnet_tiny`: `python tests/run_script.py main.py --epochs 1`."""

import runpy
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

if __name__ == "__main__":
    import tests.tiny_backbone  # noqa: F401

    del sys.argv[0]
    runpy.run_path(str(ROOT / sys.argv[0]), run_name="__main__")
