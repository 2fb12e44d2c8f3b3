"""Parity tests need diffusers and transformers: `pip install depthdiff[parity]`. In CI their absence is an error."""

import importlib.util
import os
import warnings

import pytest

MISSING = [name for name in ("diffusers", "transformers") if importlib.util.find_spec(name) is None]
if MISSING and os.environ.get("CI") == "true":
    raise ImportError(f"CI must run the parity tests, but {', '.join(MISSING)} is missing")
collect_ignore_glob = ["test_*.py"] if MISSING else []
if MISSING:
    warnings.warn(f"parity tests are left out: {', '.join(MISSING)} is missing", stacklevel=1)


@pytest.fixture(scope="session", autouse=True)
def quiet():
    """Silence the references' progress bars and notes."""
    import diffusers
    import transformers

    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
