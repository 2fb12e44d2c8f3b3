"""These tests need what their programs import: `pip install depthdiff[parity,field]`. In CI its absence is an error."""

import importlib.util
import os
import warnings

from tests.parity.conftest import quiet

NEEDED = ("diffusers", "transformers", "peft", "accelerate", "fastapi", "httpx", "compel", "onnx", "onnxscript")
MISSING = [name for name in NEEDED if importlib.util.find_spec(name) is None]
if MISSING and os.environ.get("CI") == "true":
    raise ImportError(f"CI must run the field tests, but {', '.join(MISSING)} is missing")
collect_ignore_glob = ["*.py"] if MISSING else ["programs/*.py"]
if MISSING:
    warnings.warn(f"field tests are left out: {', '.join(MISSING)} is missing", stacklevel=1)

__all__ = ["quiet"]  # a fixture that silences the references
