"""What lies where a file should, in words, and what would be right: a pointer of git-lfs, a web page, an archive; a
folder instead of a file; a model that another function reads."""

from __future__ import annotations

import pathlib
import re
from collections.abc import Collection

_UNREAD = "which is never read, for it can run any code: save the tensors with safetensors"
KINDS = {  # by how a file begins
    rb"\Z": "it is empty",
    rb"\0{16}": "it begins with zeros, as what was not downloaded to its end: download it again",
    rb"version https://git-lfs": "it is a pointer of git-lfs and not the file itself: run `git lfs pull` in its folder",
    rb"(?i)(\xef\xbb\xbf)?\s*<(!doctype html|html|head|!--)": "it is a web page and not the file: download it again "
    "from the address of the file itself (on huggingface.co with /resolve/ where the page has /blob/)",
    rb"PK\x03\x04": f"it is a zip archive, such as torch.save writes with a pickle in it, {_UNREAD}",
    rb"\x80[\x02-\x05]": f"it is a pickle, {_UNREAD}",
    rb"\x1f\x8b\x08": "it is packed: unpack it with gzip -d",
}
ORIGINAL = {"conv_in.weight", "conv_out.weight", "down.0.block.0.conv1.weight"}  # some of the names of Ho et al.'s code


def what_it_is(start: bytes) -> str:
    """Say what a file is that begins so, if it is one that often lies in the place of another; else ""."""
    if start[4:9] == b"\0\0\0\0{":  # the header of a safetensors file, whatever its length looks like
        return ""
    for pattern, words in KINDS.items():
        if re.match(pattern, start):
            return words
    text = re.fullmatch(rb"[\t\n\r -~]+", start[:8])  # as a length of a header, far too large
    begins = f"it is text, which begins with {start[:100].decode(errors='replace')!r}"
    return f"{begins}; if it was downloaded, that is what the server had to say" if text else ""


def where_it_is(folder: pathlib.Path) -> str:
    """Say which models are in a folder and what reads them: of diffusers, as they lie in a folder of folders and in the
    hub's cache (snapshots/COMMIT), or files."""
    for inside in ("", "snapshots/*/", "*/", "*/snapshots/*/"):
        for name in ("model_index.json", "config.json"):
            if found := sorted(str(path.parent) for path in folder.glob(inside + name)):
                return f"load_diffusers reads the folder {' or '.join(found[:3])}"
    files = sorted(map(str, folder.glob("*.safetensors")))
    return f"load_model and load_original read files, such as {files[0]}" if files else "No model is in it"


def who_reads(path: str | pathlib.Path, names: Collection[str], metadata: Collection[str]) -> str:
    """Say which function reads a safetensors file with such tensors and metadata; else what they are."""
    if "tinyddpm" in metadata:
        return "load_model reads it"
    if "time_embedding.linear_1.weight" in names:
        folder = pathlib.Path(path).absolute().parent
        folder = folder.parent if folder.name == "unet" else folder
        return f"it has the names of diffusers: load_diffusers reads the folder {folder}, with its config.json"
    if {name.removeprefix("module.") for name in names} >= ORIGINAL:
        return "it has the names of Ho et al.'s code: load_original reads it"
    if any("lora" in name.lower() for name in names):
        return "it is a LoRA, which only changes another network, and nothing here reads it"
    return f"it has {', '.join(sorted(names)[:10]) or 'no tensors'}"
