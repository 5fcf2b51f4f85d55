"""What all tests share: the native core under test may be another build than the installed one."""

from __future__ import annotations

import importlib.util
import os
import sys

# A build with sanitizers, say: tests/native/test_sanitized.py runs the engine tests on one.
if path := os.environ.get("MCRELAY_NATIVE"):
    name = "mcrelay.engines._native"
    specification = importlib.util.spec_from_file_location(name, path)
    assert specification
    assert specification.loader
    module = importlib.util.module_from_spec(specification)
    sys.modules[name] = module
    specification.loader.exec_module(module)
