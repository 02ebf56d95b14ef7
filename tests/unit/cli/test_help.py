"""``--help`` is there at once: it takes no more than half a second, most of it for Python, typer and pydantic."""

from __future__ import annotations

import subprocess
import sys

HEAVY = {
    *("torch", "torchvision", "open_clip", "opacus", "tenseal", "flwr", "grpc", "ray", "onnx", "transformers", "timm"),
    *("scipy", "sklearn", "matplotlib", "PIL", "imagehash", "pydicom", "prometheus_client", "fastapi", "uvicorn"),
}
"""What takes long to import, or what no help needs."""


def test_help_imports_nothing_that_takes_long() -> None:
    program = f"""
import sys
from secure_fed.cli import main
sys.argv = ["secfacmic", "--help"]
try:
    main()
except SystemExit as end:
    assert not end.code
print(sorted({HEAVY!r} & set(sys.modules)), file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-P", "-c", program], capture_output=True, text=True, check=True)
    assert "simulate" in done.stdout
    assert done.stderr.strip() == "[]"
