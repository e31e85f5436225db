"""Write an OpenVINO model file (IR, version 11) whose large constants are streamed into it.

OpenVINO's own writer wants every constant in memory. Here it writes the graph with parameters in their place; then
the bytes are appended to the weights file, and in the XML each such parameter becomes a constant that points there.
Both kinds of layer have the same single output, so that nothing else changes.

Format: openvino ``docs/articles_en/documentation/openvino-ir-format``, and files that ``openvino.save_model`` writes.
"""

from __future__ import annotations

import hashlib
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from minitron.machine.openvino import ov
from minitron_build.engines.openvino.weights import Constant

XML, BIN = "openvino_model.xml", "openvino_model.bin"
_ALIGNMENT = 64


def write(
    model: Any, constants: list[Constant], folder: Path, advance: Callable[[int, str], None] = lambda _n, _name: None
) -> dict[str, str]:
    """Write ``model`` into ``folder``, which is made; returns the SHA-256 of each file by name.

    ``advance`` is told the bytes of each constant after it was written.
    """
    folder.mkdir()
    xml, weights = folder / XML, folder / BIN
    ov.save_model(model, xml, compress_to_fp16=False)
    digest = hashlib.sha256(weights.read_bytes())
    offsets = {}
    with open(weights, "ab") as file:
        for constant in constants:
            offsets[constant.name] = _append(file, digest, constant)
            advance(constant.nbytes, constant.name)
    _point_to(xml, constants, offsets)
    return {BIN: digest.hexdigest(), XML: hashlib.sha256(xml.read_bytes()).hexdigest()}


def _append(file: BinaryIO, digest: Any, constant: Constant) -> int:
    """Append a constant's bytes at an aligned place, and return that place."""
    padding = b"\0" * (-file.tell() % _ALIGNMENT)
    file.write(padding)
    digest.update(padding)
    offset = file.tell()
    for piece in constant.pieces():
        data = np.ascontiguousarray(piece).reshape(-1).view(np.uint8).data
        file.write(data)
        digest.update(data)
    assert file.tell() - offset == constant.nbytes
    return offset


def _point_to(xml: Path, constants: list[Constant], offsets: dict[str, int]) -> None:
    """Turn the parameters that stand for ``constants`` into constants at their offsets."""
    tree = ET.parse(xml)
    layers = {layer.get("id"): layer for layer in tree.iterfind("layers/layer")}
    by_name = {layer.get("name"): layer for layer in layers.values()}
    readers = {edge.get("from-layer"): layers[edge.get("to-layer")] for edge in tree.iterfind("edges/edge")}
    for constant in constants:
        layer = by_name[constant.name]
        layer.set("type", "Const")
        data = layer.find("data")
        assert data is not None
        data.attrib = {
            "element_type": constant.element,
            "shape": ", ".join(map(str, constant.shape)),
            "offset": str(offsets[constant.name]),
            "size": str(constant.nbytes),
        }
        if constant.element in ("f16", "bf16"):
            _keep_compressed(readers[layer.get("id")])
    tree.write(xml, encoding="utf-8", xml_declaration=True)


def _keep_compressed(convert: ET.Element) -> None:
    """Mark a conversion as decompression; without it the plugin would expand the constant to float32 on load."""
    information = ET.Element("rt_info")
    ET.SubElement(information, "attribute", name="decompression", version="0")
    convert.insert(1, information)
