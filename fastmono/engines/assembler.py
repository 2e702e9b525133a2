"""Which assembler makes Triton's machine code: results depend on it as they do on Triton."""

from __future__ import annotations

import functools
import re
import subprocess

import torch


def assembler(architecture: int) -> str:
    """The path of the ptxas that Triton uses for an architecture (90 for sm_90): its own, or the one that
    TRITON_PTXAS_PATH names."""
    from triton.backends.nvidia import compiler

    return str(compiler.get_ptxas(architecture).path)


@functools.lru_cache
def assembler_version(path: str) -> str:
    """The version of a ptxas, as 12.8.93; "unknown" where it does not say."""
    try:
        said = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=30).stdout
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    version = re.search(r", V(\d[\d.]*)", said)
    return version[1] if version else "unknown"


def compiler_versions() -> dict[str, str]:
    """Versions of Triton and of the ptxas that it uses for the device here (for sm_90 where there is none), for a run's
    records; empty where there is no Triton."""
    try:
        import triton
    except ImportError:
        return {}
    found = {"triton": triton.__version__}
    major, minor = torch.cuda.get_device_capability() if torch.cuda.is_available() else (9, 0)
    try:
        return found | {"ptxas": assembler_version(assembler(10 * major + minor))}
    except Exception:  # a build of Triton without that backend, or another name for it
        return found
