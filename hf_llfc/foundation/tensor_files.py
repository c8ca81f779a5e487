"""Small safetensors files, written at once."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from stat import S_IMODE
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def save_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Writes a safetensors file with the permissions of any new file, which the library keeps to the user alone.

    Args:
        tensors: By name.
        path: The file.
        metadata: What stands in its header.
    """
    from safetensors.torch import save_file

    path.touch()
    mode = S_IMODE(path.stat().st_mode)
    save_file(dict(tensors), path, metadata=dict(metadata) if metadata is not None else None)
    path.chmod(mode)
