"""Safetensors of any origin: what a header can claim is judged before a tensor is made of it."""

import json
import math
import struct

import pytest
import torch

import checkpoint as ckpt
from harness.errors import InputError
from harness.files import RefusedFile
from harness.safetensors_files import KINDS, MAX_HEADER_BYTES, load_safetensors, save_safetensors


def claimed(header, content=b""):
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + content


def tensor(kind, shape, n):
    """A file of one tensor of n bytes."""
    return claimed({"upsampler.a": {"dtype": kind, "shape": shape, "data_offsets": [0, n]}}, bytes(n))


REFUSED = {
    **{kind: tensor(kind, [8], 8) for kind in ("F8_E4M3", "F8_E5M2", "F8_E8M0")},
    **{kind: tensor(kind, [8], n) for kind, n in (("F4", 4), ("F6_E2M3", 6), ("C64", 64), ("U16", 16), ("U64", 64))},
    "no such type": tensor("F7", [8], 8),
    "9 dimensions": tensor("F32", [1] * 9, 4),
    "5,000 dimensions": tensor("F32", [1] * 5_000, 4),
    "a size of 2**64 - 1": tensor("F32", [0, 2**64 - 1], 0),
    "a size of 2**62": tensor("F32", [2**62, 0], 0),
    "a size of 10**400": tensor("F32", [0, 10**400], 0),
    "a size of -1": tensor("F32", [-1], 4),
    "more numbers than bytes": tensor("F32", [9], 4),
    "a header that is too long": claimed({"__metadata__": {"x": "x" * MAX_HEADER_BYTES}}),
    "a header without end": struct.pack("<Q", 2**63) + b"{",
    "nests": struct.pack("<Q", 100_000) + b"[" * 100_000,
    "empty": b"",
    "cut": tensor("F32", [8], 32)[:-1],
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_torch_cannot_judge_is_refused_in_one_line(what, tmp_path):
    path = tmp_path / "w.safetensors"
    path.write_bytes(REFUSED[what])
    with pytest.raises(RefusedFile):
        load_safetensors(path, 2**33)
    with pytest.raises(InputError, match=r"w\.safetensors: refused, ") as raised:
        ckpt.load_checkpoint(path)
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 300


@pytest.mark.parametrize("kind", KINDS)
def test_all_kinds_of_numbers_that_are_known_are_read_and_judged(kind, tmp_path):
    path = tmp_path / "w.safetensors"
    width = int(kind.lstrip("BFIU")) // 8 if kind != "BOOL" else 1
    for shape in ([], [0], [2, 3], [1] * 8):
        path.write_bytes(tensor(kind, shape, math.prod(shape) * width))
        [found] = load_safetensors(path, 2**33)[0].values()
        assert list(found.shape) == shape and found.isfinite().all()


@pytest.mark.parametrize("name", ["ü.safetensors", "b3\udcff.safetensors"])
def test_names_need_not_be_utf8(name, tmp_path):
    weights = {"a": torch.arange(6.0).view(2, 3)}
    save_safetensors(tmp_path / name, weights, {"data": "tones"})
    found, texts = load_safetensors(tmp_path / name, 2**33)
    assert found["a"].equal(weights["a"]) and texts == {"data": "tones"}
