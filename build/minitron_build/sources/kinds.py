"""What a file is by its first bytes, whatever its name says."""

from __future__ import annotations

from pathlib import Path

GGUF = b"GGUF"
#: First bytes, and what a file that begins with them is when it is neither a GGUF nor a safetensors file.
_OTHERS: tuple[tuple[bytes, str], ...] = (
    (b"version https://git-lfs", "a Git LFS pointer in place of the file; 'git lfs pull' fetches it"),
    (b"tjgg", "a file of llama.cpp from before GGUF; convert the model again"),
    (b"fmgg", "a file of llama.cpp from before GGUF; convert the model again"),
    (b"lmgg", "a file of llama.cpp from before GGUF; convert the model again"),
    (b"algg", "a LoRA adapter of llama.cpp from before GGUF; merge it into its model first"),
    (b"PK\x03\x04", "a zip archive, as torch.save writes; save the model again with safe_serialization=True"),
    (b"\x80\x02", "a pickle, as torch.save writes; save the model again with safe_serialization=True"),
    (b"\x1f\x8b", "compressed; unpack it first"),
    (b"\x89HDF", "an HDF5 file; save the model again with safe_serialization=True"),
    (b"<", "a web page, perhaps an error of the server that it was fetched from; fetch it again"),
)


def is_gguf(path: Path) -> bool:
    """Whether the file begins as a GGUF file does."""
    return _head(path).startswith(GGUF)


def other(path: Path) -> str | None:
    """What else than GGUF the file is, and what to do about it; None where its first bytes do not tell."""
    if _is_safetensors(_head(path)):
        return "one safetensors file; name the folder that it is in"
    return _neither(_head(path))


def instead_of_safetensors(path: Path) -> str | None:
    """The same for a file that should be a safetensors file."""
    head = _head(path)
    if head.startswith(GGUF):
        return "a GGUF file; give it a name of its own"
    return None if _is_safetensors(head) else _neither(head)


def _is_safetensors(head: bytes) -> bool:
    return head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 1 << 32


def _neither(head: bytes) -> str | None:
    return next((words for magic, words in _OTHERS if head.startswith(magic)), None)


def _head(path: Path) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read(32)
    except OSError:
        return b""
