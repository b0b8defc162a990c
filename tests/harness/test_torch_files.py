"""torch_files.py: only what torch.save writes is read; every other archive and every flipped bit is refused.

Archives are forged by a writer of our own, so that each can lie in one place and be right in all others.
"""

import io
import random
import struct
import zipfile
import zlib
from dataclasses import dataclass, replace

import pytest
import torch

from harness.checkpoints import read_torch_file, save_whole
from harness.errors import InputError
from harness.torch_files import RefusedFile, digest, load_tensors
from image_density_experiments import checkpoint as image_checkpoint

LIMIT = 2**30
CONTENT = {
    "model": {"a": torch.arange(60.0).reshape(6, 10), "empty": torch.zeros(0), "b": torch.ones(3).bfloat16()},
    "iteration": 7,
    "config": {"sizes": [1, 2], "rate": 0.25, "name": "é", "none": None, "on": True, "pair": (1, 2)},
}  # fmt: skip


# --- forged archives


@dataclass(frozen=True)
class Part:
    """An entry to be written; what is None is as it should be."""

    name: str
    content: bytes
    local_name: str | None = None
    crc: int | None = None  # of the directory
    size: int | None = None  # of the directory
    flags: int = 0x800
    method: int = 0
    gap: bytes = b""  # before it
    listed: bool = True
    extra: bytes = b""
    offset: int | None = None

    def packed(self):
        return zlib.compress(self.content)[2:-4] if self.method == 8 else self.content


def local(part):
    name, content = (part.local_name or part.name).encode(), part.packed()
    sizes = (zlib.crc32(part.content), len(content), len(part.content))
    return struct.pack("<4sHHHHHIIIHH", b"PK\3\4", 20, part.flags, part.method, 0, 0, *sizes, len(name), 0) + name


def central(part, offset):
    name = part.name.encode()
    crc = zlib.crc32(part.content) if part.crc is None else part.crc
    size = len(part.content) if part.size is None else part.size
    packed = len(part.packed()) if part.size is None else part.size
    offset = offset if part.offset is None else part.offset
    fields = (0, 20, part.flags, part.method, 0, 0, crc, packed, size, len(name), len(part.extra), 0, 0, 0, 0, offset)
    return struct.pack("<4sHHHHHHIIIHHHHHII", b"PK\1\2", *fields) + name + part.extra


def end(n, length, start, comment=b""):
    return struct.pack("<4sHHHHIIH", b"PK\5\6", 0, 0, n, n, length, start, len(comment)) + comment


def forged(parts, before=b"", after=b"", order=list, comment=b"", n=None, shift=0):
    """An archive of the parts."""
    body, listed = before, []
    for part in parts:
        body += part.gap
        if part.listed:
            listed.append((part, len(body)))
        body += local(part) + part.packed()
    directory = b"".join(central(part, offset) for part, offset in order(listed))
    return body + directory + end(n or len(listed), len(directory), len(body) + shift, comment) + after


def parts_of(content):
    """The entries that torch.save writes of it, by name."""
    file = io.BytesIO()
    torch.save(content, file)
    with zipfile.ZipFile(file) as archive:
        return {name.partition("/")[2]: Part(name, archive.read(name)) for name in archive.namelist()}


PARTS = parts_of(CONTENT)
OTHER = parts_of({**CONTENT, "iteration": 8})
PICKLE = PARTS["data.pkl"]
LIE = replace(OTHER["data.pkl"], name="archive/data.pkl")


def changed(which, **changes):
    """All parts, one of them changed."""
    return [replace(part, **changes) if key == which else part for key, part in PARTS.items()]


def with_part(part, first=False):
    return [part, *PARTS.values()] if first else [*PARTS.values(), part]


def two_directories():
    """One reader takes the last end, another the first, whose directory lists another pickle."""
    whole, lie = forged(list(PARTS.values())), forged([LIE, *(p for k, p in PARTS.items() if k != "data.pkl")])
    return whole + lie, lie + whole, whole + lie[lie.index(b"PK\1\2") :]


FORGED = {
    "names in other case": forged(changed("data.pkl", name="archive/DATA.PKL")),
    "both cases, the lie first": forged(with_part(replace(LIE, name="archive/DATA.PKL"), first=True)),
    "both cases, the lie last": forged(with_part(replace(LIE, name="archive/Data.pkl"))),
    "the pickle twice": forged(with_part(LIE)),
    "the pickle twice, the lie first": forged(with_part(LIE, first=True)),
    "numbers twice": forged(with_part(replace(PARTS["data/0"], content=bytes(240)))),
    "another name for a number": forged(with_part(Part("archive/data/00", bytes(240)))),
    "two folders": forged(with_part(Part("other/data.pkl", LIE.content))),
    "no folder": forged(changed("data.pkl", name="data.pkl")),
    "a path that leaves": forged(with_part(Part("archive/../data.pkl", LIE.content))),
    "an absolute path": forged(with_part(Part("/archive/data.pkl", LIE.content))),
    "a null byte in a name": forged(with_part(Part("archive/data.pkl\0x", LIE.content))),
    "code, as TorchScript has": forged(with_part(Part("archive/code/a.py", b"1"))),
    "constants.pkl": forged(with_part(Part("archive/constants.pkl", b"N."))),
    "no pickle": forged([part for name, part in PARTS.items() if name != "data.pkl"]),
    "numbers missing": forged([part for name, part in PARTS.items() if name != "data/0"]),
    "a deflated pickle": forged(changed("data.pkl", method=8)),
    "deflated numbers": forged(changed("data/0", method=8)),
    "another method": forged(changed("data/0", method=12)),
    "an encrypted entry": forged(changed("data/0", flags=0x801)),
    "a promised descriptor": forged(changed("data/0", flags=0x808)),
    "a wrong checksum of numbers": forged(changed("data/0", crc=1)),
    "a wrong checksum of the pickle": forged(changed("data.pkl", crc=1)),
    "numbers of other bytes": forged(changed("data/0", content=b"\1" * 240, crc=zlib.crc32(PARTS["data/0"].content))),
    "a size too large": forged(changed("data/0", size=241)),
    "a size too small": forged(changed("data/0", size=239)),
    "a size beyond the file": forged(changed("data/0", size=2**31)),
    "a size in 64 bits": forged(changed("data/0", size=0xFFFFFFFF, extra=struct.pack("<HHQQ", 1, 16, 2**60, 2**60))),
    "64 bits that are missing": forged(changed("data/0", size=0xFFFFFFFF)),
    "an extra field that is too short": forged(changed("data/0", extra=b"\1")),
    "an extra field with another name": forged(changed("data/0", extra=b"up\x05\x00\x01lies")),
    "another local name": forged(changed("data.pkl", local_name="archive/data.pkx")),
    "the name of numbers over the pickle": forged(changed("data/0", local_name="archive/data/1")),
    "a gap before an entry": forged(changed("data/0", gap=b"gap")),
    "a gap with another pickle": forged(changed("data/0", gap=local(LIE) + LIE.content)),
    "an entry that is not listed": forged(changed("version", listed=False)),
    "the same bytes for two": forged(changed("data/2", offset=0)) if "data/2" in PARTS else b"PK\3\4",
    "an offset beyond the file": forged(changed("data/0", offset=2**31)),
    "bytes before": forged(list(PARTS.values()), before=b"before"),
    "bytes before, the start kept": b"PK\3\4" + forged(list(PARTS.values())),
    "bytes after": forged(list(PARTS.values()), after=b"after"),
    "a comment": forged(list(PARTS.values()), comment=b"a comment"),
    "an end inside the comment": forged(list(PARTS.values()), comment=end(1, 60, 0)),
    "another order in the directory": forged(list(PARTS.values()), order=lambda listed: listed[::-1]),
    "fewer than listed": forged(list(PARTS.values()), n=1),
    "more than listed": forged(list(PARTS.values()), n=100),
    "a directory elsewhere": forged(list(PARTS.values()), shift=4),
    "two archives": two_directories()[0],
    "two archives, the lie first": two_directories()[1],
    "two directories": two_directories()[2],
    "nothing but an end": end(0, 0, 0),
    "an empty archive": b"PK\3\4" + end(0, 0, 4),
    "half": forged(list(PARTS.values()))[:400],
}


@pytest.mark.parametrize("lie", FORGED)
def test_an_archive_that_torch_does_not_write_is_refused(lie, tmp_path):
    (tmp_path / "file").write_bytes(FORGED[lie])
    with pytest.raises(RefusedFile):
        load_tensors(tmp_path / "file", LIMIT)


def test_the_forger_can_be_honest(tmp_path):
    (tmp_path / "file").write_bytes(forged(list(PARTS.values())))
    assert digest(load_tensors(tmp_path / "file", LIMIT)) == digest(CONTENT)


@pytest.mark.parametrize("name", ["plain", "waveflow_10.pt", "é", "a b.c.d"])
@pytest.mark.parametrize("legacy", [False, True])
def test_what_torch_writes_is_read_whatever_its_name(name, legacy, tmp_path):
    torch.save(CONTENT, tmp_path / name, _use_new_zipfile_serialization=not legacy)
    assert digest(load_tensors(tmp_path / name, LIMIT)) == digest(CONTENT)


def test_what_torch_read_is_what_was_checked(tmp_path, monkeypatch):
    """The file is another one by the time that torch reads it: its numbers are refused, its pickle is not looked at."""
    path, real = tmp_path / "file", torch.load
    torch.save(CONTENT, path)
    content = path.read_bytes()
    for stretch in ("numbers", "all"):
        path.write_bytes(content)

        def swapped(file, stretch=stretch, **options):
            place = content.index(PARTS["data/0"].content)
            new = bytearray(b"\7" * len(content) if stretch == "all" else content)
            new[place : place + 240] = b"\7" * 240
            with open(path, "r+b") as target:
                target.write(new)
            return real(file, **options)

        monkeypatch.setattr(torch, "load", swapped)
        with pytest.raises(RefusedFile, match="a checksum differs"):
            load_tensors(path, LIMIT)


# --- flipped bits


def flips(content, n, dice):
    """n copies of the content with one bit changed: half of them anywhere, half where archives say what they hold."""
    marks = (b"PK\1\2", b"PK\3\4", b"PK\5\6", b"PK\6\6")
    places = [place for place in range(len(content)) if content.startswith(marks, place)] or [0]
    for number in range(n):
        place = dice.randrange(len(content)) if number % 2 else dice.choice(places) + dice.randrange(60)
        place = min(place, len(content) - 1)
        damaged = bytearray(content)
        damaged[place] ^= 1 << dice.randrange(8)
        yield bytes(damaged)


@pytest.mark.parametrize("n", [400, pytest.param(20_000, marks=pytest.mark.soak)])
@pytest.mark.parametrize("legacy", [False, True])
def test_a_flipped_bit_is_noticed_or_means_nothing(n, legacy, tmp_path):
    path = tmp_path / "file"
    save_whole(path, CONTENT)
    if legacy:  # has no checksums of its own, but the digest
        torch.save(torch.load(path, weights_only=True), path, _use_new_zipfile_serialization=False)
    n_read = 0
    for damaged in flips(path.read_bytes(), n, random.Random(0)):
        if legacy and b"digest" not in damaged:
            continue  # a file without checksums and without a digest: nothing can tell
        path.write_bytes(damaged)
        try:
            found = read_torch_file(path)
            if legacy and not (isinstance(found, dict) and found):  # no checkpoint any more, as its readers say
                image_checkpoint.load_checkpoint(path)
            assert digest(found) == digest(CONTENT)
            n_read += 1
        except InputError as error:
            assert ("refused, " in str(error) or "no weights" in str(error)) and "\n" not in str(error)
    assert n_read < n / 3  # padding, dates and the like


# --- contents


def nested(depth, kind):
    item = kind()
    for _ in range(depth):
        item = kind((item, item))
    return item


@pytest.mark.parametrize("kind", [list, tuple])
@pytest.mark.parametrize("legacy", [False, True])
def test_containers_shared_beyond_measure_are_refused_at_once(kind, legacy, tmp_path):
    """60 levels of pairs of the same thing are 2^60 items to whoever walks, prints, compares or hashes them."""
    path = tmp_path / "file"
    torch.save({"model": {}, "x": nested(60, kind)}, path, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(RefusedFile, match="beyond all measure"):
        load_tensors(path, LIMIT)
    with pytest.raises(RefusedFile, match="beyond all measure"):
        digest({"x": nested(60, kind)})


@pytest.mark.parametrize(
    "change",
    [
        {"iteration": 8}, {"iteration": 7.0}, {"iteration": "7"}, {"iteration": True}, {"more": None}, {"model": {}},
        {"model": {**CONTENT["model"], "a": CONTENT["model"]["a"].double()}},
        {"model": {**CONTENT["model"], "a": CONTENT["model"]["a"].view(10, 6)}},
        {"model": {**CONTENT["model"], "a": -CONTENT["model"]["a"]}},
        {"model": dict(reversed(CONTENT["model"].items()))},
        {"config": {**CONTENT["config"], "sizes": (1, 2)}}, {"config": {**CONTENT["config"], "sizes": [[1], 2]}},
        {"config": {**CONTENT["config"], "rate": 0.25000000000000006}},
    ],
)  # fmt: skip
def test_the_digest_is_over_everything(change):
    assert digest({**CONTENT, **change}) != digest(CONTENT)


def test_a_digest_that_differs_is_refused(tmp_path):
    save_whole(tmp_path / "file", CONTENT)
    content = torch.load(tmp_path / "file", weights_only=True)
    assert digest(read_torch_file(tmp_path / "file")) == digest(CONTENT)
    content["model"]["a"][0, 0] += 1  # in memory, before an archive with the right checksums is made of it
    torch.save(content, tmp_path / "file")
    with pytest.raises(InputError, match="not those of its digest"):
        read_torch_file(tmp_path / "file")


# --- tensors of odd strides, sizes and kinds


def odd_tensors():
    """(what, tensor) of every kind of number, and of every number of dimensions and way to lie in memory."""
    kinds = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.complex64, torch.bool, torch.uint8]
    kinds += [torch.int64, torch.int8]
    for kind in kinds:
        wide = torch.arange(4 * 6 * 5).reshape(4, 6, 5).to(kind)
        layouts = {
            "0 dimensions": wide[1, 2, 3],
            "one of stride 0": wide[0, 0, 0].expand(1),
            "one of stride 0, 3 dimensions": wide[0, 0, 1].expand(1, 1, 1),
            "one, cut out in steps": wide[::4, 1::6, 3::5],
            "one, from a column": wide[:, 0, 0][1:2],
            "stride 0": wide[0, 0, 1].expand(3, 7),
            "a repeated row": wide[0].expand(3, 6, 5),
            "none": wide[:0],
            "none, of 3 dimensions": wide[:, :0],
            "none, expanded": wide[:0, 0].expand(0, 5),
            "transposed": wide.permute(2, 0, 1),
            "in steps": wide[::2, ::3, 1::2],
            "overlapping": wide.as_strided((9, 5), (1, 2)),
            "channels last": wide[None].contiguous(memory_format=torch.channels_last),
            "a tail": wide.flatten()[100:],
        }
        yield from ((f"{kind}, {what}", tensor) for what, tensor in layouts.items())
    yield "with a gradient", torch.ones(3, requires_grad=True)
    yield "a parameter", torch.nn.Parameter(torch.ones(2, 2))


ODD = dict(odd_tensors())


@pytest.mark.parametrize("what", ODD)
def test_a_tensor_of_any_layout_is_saved_with_a_digest_and_read(what, tmp_path):
    tensor = ODD[what]
    save_whole(tmp_path / "file", {"x": tensor, "room for what is repeated": torch.zeros(1000)})
    found = read_torch_file(tmp_path / "file")["x"]
    assert found.dtype == tensor.dtype and torch.equal(found, tensor)
    copy = torch.zeros(tensor.shape, dtype=tensor.dtype).copy_(tensor.detach())
    assert digest(tensor) == digest(copy) == digest(found)
    if tensor.numel():
        other = copy.flatten().clone()
        other[-1] = other[-1] == 0
        assert digest(other.reshape(tensor.shape)) != digest(copy)


@pytest.mark.parametrize(
    "said", ["x", "", "0" * 64, 5, None, [], {}, torch.zeros(3), torch.zeros(()).expand(1), 2**5000]
)
@pytest.mark.parametrize("legacy", [False, True])
def test_a_digest_that_is_none_is_a_damaged_file(said, legacy, tmp_path):
    for extra in (torch.zeros(()).expand(1), torch.ones(5, 5)[1:2, ::5], 2**70, "\ud800", {3: {None: ()}}):
        content = {"model": {"a": torch.ones(3)}, "extra": extra, "digest": said}
        torch.save(content, tmp_path / "file", _use_new_zipfile_serialization=not legacy)
        with pytest.raises(InputError, match="refused, "):
            read_torch_file(tmp_path / "file")


def unusual():
    """Tensors that torch saves and hardly anything can be done with."""
    yield torch.ones(3, dtype=torch.complex64).conj()
    yield torch.ones(3, dtype=torch.complex64).conj().imag
    yield torch.zeros(3, 3).to_sparse()
    yield torch.zeros(3, device="meta")
    for name in ("float8_e5m2", "float8_e4m3fn", "uint16", "uint32", "uint64", "float8_e8m0fnu"):
        if hasattr(torch, name):
            yield torch.zeros(3, dtype=torch.uint8).view(torch.uint8).to(torch.float32).to(getattr(torch, name))


@pytest.mark.parametrize("tensor", list(unusual()), ids=lambda t: f"{t.dtype} {t.layout}, {t.device}, {t.is_neg()}")
def test_unusual_tensors_are_refused(tensor, tmp_path):
    for place in ({"model": {"a": tensor}}, {"x": [tensor], "digest": "x"}):
        torch.save(place, tmp_path / "file")
        with pytest.raises(RefusedFile):
            load_tensors(tmp_path / "file", LIMIT)
