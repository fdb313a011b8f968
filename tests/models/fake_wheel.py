"""Writes a wheel that pip accepts, with a model in it, so that pip can be asked without a network."""

from __future__ import annotations

import hashlib
import zipfile
from pathlib import Path

from edgert.models.known import KnownModel


def write_wheel(directory: Path, content: bytes, package: str = "edgert-tiny-model", version: str = "1.0",
                file_name: str = "Tiny.Q4_1.gguf") -> KnownModel:
    """The wheel in `directory`, and how KNOWN_MODELS would describe it."""
    module = package.replace("-", "_")
    wheel = directory / f"{module}-{version}-py3-none-any.whl"
    info = f"{module}-{version}.dist-info"
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(f"{module}/__init__.py", "")
        archive.writestr(f"{module}/{file_name}", content)
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return KnownModel("tiny", package, version, wheel.stat().st_size, file_name, len(content),
                      hashlib.sha256(content).hexdigest())
