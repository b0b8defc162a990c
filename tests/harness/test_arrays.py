"""arrays.py and memory.py: what headers promise is added up before it is believed; nothing is unpacked beyond it."""

import io
import random
import struct
import tracemalloc
import zipfile
import zlib

import numpy as np
import pytest

from audio import mel_frames, read_mel
from harness import arrays, memory
from harness.arrays import map_array, read_archive, read_header
from harness.errors import InputError
from harness.files import RefusedFile
from image_density_experiments.datasets import load_images

PLAIN = np.random.default_rng(0).integers(0, 250, (6, 8, 8, 3)).astype(np.uint8)


def npy(array, version=None):
    content = io.BytesIO()
    np.lib.format.write_array(content, np.asanyarray(array), version)
    return content.getvalue()


def header(shape, descr="|u1", version=1, padding=0):
    """The header of an .npy that promises whatever it likes."""
    text = f"{{'descr': {descr!r}, 'fortran_order': False, 'shape': {shape}, }}" + " " * padding + "\n"
    length = struct.pack("<H" if version == 1 else "<I", len(text))
    return b"\x93NUMPY" + bytes([version, 0]) + length + text.encode()


def packed(path, entries, kind=zipfile.ZIP_DEFLATED):
    with zipfile.ZipFile(path, "w", kind) as archive:
        for name, content in entries:
            archive.writestr(f"{name}.npy", content)
    return path


def deflated(content):
    packer = zlib.compressobj(9, wbits=-15)
    return packer.compress(content) + packer.flush(zlib.Z_FULL_FLUSH)


MEGABYTE = deflated(bytes(1 << 20))


class Quick:
    """A compressor that knows what a megabyte of zeros becomes."""

    def compress(self, content):
        return MEGABYTE if len(content) == 1 << 20 else deflated(content)

    def flush(self):
        return zlib.compressobj(wbits=-15).flush()


def zeros(path, *sizes):
    """An archive of arrays of zeros, a thousandth of what it unpacks to, quickly written."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive, pytest.MonkeyPatch.context() as patched:
        patched.setattr(zipfile, "_get_compressor", lambda *_: Quick())
        patched.setattr(zipfile, "crc32", lambda content, before=0: before)
        for name, shape in sizes:
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                member.write(header(shape))
                for _ in range(int(np.prod(shape)) >> 20):
                    member.write(bytes(1 << 20))
    return path


# --- what numpy writes


KINDS = ["?", "|u1", "<u2", ">u2", "<i4", ">i8", "<f4", ">f8", "<f2"]
SHAPES = [(), (0,), (3, 0, 2), (1,), (7,), (2, 3, 4), (1, 1, 1, 1, 1)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("version", [(1, 0), (2, 0)])
def test_what_numpy_writes_is_read(kind, order, version, tmp_path):
    for shape in SHAPES:
        array = np.asarray(np.random.default_rng(1).integers(0, 2, shape).astype(kind), order=order)
        (tmp_path / "a.npy").write_bytes(npy(array, version))
        found = map_array(tmp_path / "a.npy")
        assert found.dtype == array.dtype and found.shape == shape and np.array_equal(found, array)
        assert read_header(tmp_path / "a.npy").shape == shape
        for save in (np.savez, np.savez_compressed):
            save(tmp_path / "a.npz", array, x=array)
            for copy in read_archive(tmp_path / "a.npz").values():
                assert copy.dtype == array.dtype and copy.shape == shape and np.array_equal(copy, array)


# --- what is promised


def refused(read, path):
    """The reason; refused without taking memory, and in one line."""
    tracemalloc.start()
    try:
        with pytest.raises((RefusedFile, InputError)) as raised:
            read(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 50e6, f"{peak / 1e6:.0f} MB"
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 500
    return str(raised.value)


HEADERS = [
    *(header(shape) for shape in ("(80, 1 << 40)", (80, 2**40), (2**64,), (-1, 5), (2**31, 2**31, 2**31), ("a",), 5)),
    *(header((4,), descr) for descr in ("|O", "<U5", "|S3", "<M8[s]", "<c8", "<V4", "no", "", "<f" + "9" * 50)),
    *(header((4,), version=version, padding=padding) for version, padding in ((1, 30_000), (2, 10**6), (3, 0), (9, 0))),
    header([("a", "<f4")]), b"", b"\x93NUMPY", b"\x93NUMPY\2\0\xff\xff\xff\xff", b"\x93NUMPY\1\0\0\0", bytes(5000),
    b"(" * 5000, b"\x93NUMPY\1\0\x85\3" + b"(" * 900 + b"\n", b"\x93NUMPY\1\0\x10\0" + b"__import__('os')",
]  # fmt: skip


@pytest.mark.parametrize("content", HEADERS, ids=range(len(HEADERS)))
def test_headers_that_promise_too_much_are_refused_in_every_reader(content, tmp_path):
    (tmp_path / "a.npy").write_bytes(content + b"1234")
    packed(tmp_path / "a.npz", [("images", content + b"1234")])
    for read in (map_array, read_header, lambda path: read_mel(path, 80), lambda path: load_images("folder", path)):
        refused(read, tmp_path / "a.npy")
    for read in (read_archive, lambda path: load_images("folder", path)):
        refused(read, tmp_path / "a.npz")
    refused(lambda path: mel_frames(path, 80), tmp_path / "a.npy")


GIGABYTE = 1 << 30


@pytest.mark.parametrize(
    "sizes",
    [
        [("images", (3 * GIGABYTE // 192, 8, 8, 3))],
        [("images", (4, 8, 8, 3)), ("labels", (5 * GIGABYTE // 2,))],  # of them only the labels
        [(f"a{number}", (GIGABYTE // 4,)) for number in range(9)],  # each alone would do
    ],
    ids=["images", "labels", "together"],
)
def test_megabytes_that_unpack_to_gigabytes_are_refused(sizes, tmp_path):
    path = zeros(tmp_path / "train_data_batch_1.npz", *sizes)
    assert path.stat().st_size < 4e6
    (tmp_path / "val_data.npz").write_bytes(path.read_bytes())
    assert "unpacks to" in refused(read_archive, path)
    assert "unpacks to" in refused(lambda path: load_images("folder", path), path)
    assert "unpacks to" in refused(lambda path: load_images("imagenet32", path.parent), path)
    assert not list(tmp_path.glob("*.images.npy"))


def test_an_archive_that_would_not_fit_into_memory_is_refused(tmp_path, monkeypatch):
    path = zeros(tmp_path / "a.npz", ("images", (1 << 24,)))
    with pytest.raises(RefusedFile, match="CRC"):  # the test's own archive does without; nothing else is wrong with it
        read_archive(path)
    monkeypatch.setattr(arrays, "available_bytes", lambda: 1e6)
    assert "1000000 are free" in refused(read_archive, path)


def test_entries_do_not_unpack_to_more_than_they_declare(tmp_path):
    """The directory and the entry say 200 bytes, the stream has megabytes."""
    content = npy(np.zeros(8 << 20, np.uint8))
    path = packed(tmp_path / "a.npz", [("images", content)])
    said, lie = struct.pack("<I", len(content)), struct.pack("<I", 200)
    path.write_bytes(path.read_bytes().replace(said, lie))
    assert "damaged" in refused(read_archive, path)


def test_directories_without_end_are_refused(tmp_path):
    path = tmp_path / "a.npz"
    with zipfile.ZipFile(path, "w") as archive:
        for number in range(5000):
            archive.writestr(f"{number:01000d}.npy", b"")
    tracemalloc.start()
    with pytest.raises(RefusedFile, match="endless directory"):
        read_archive(path)
    assert tracemalloc.get_traced_memory()[1] < 20e6
    tracemalloc.stop()


@pytest.mark.parametrize("kind", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_what_numpy_does_not_pack_with_is_refused(kind, tmp_path):
    assert "otherwise than numpy" in refused(read_archive, packed(tmp_path / "a.npz", [("a", npy(PLAIN))], kind))


def test_two_arrays_of_one_name_are_refused(tmp_path):
    with pytest.warns(UserWarning, match="Duplicate name"):
        path = packed(tmp_path / "a.npz", [("a", npy(PLAIN)), ("a", npy(PLAIN + 1))])
    assert "two arrays" in refused(read_archive, path)


@pytest.mark.parametrize("n", [200, pytest.param(5000, marks=pytest.mark.soak)])
@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_flipped_bits_of_archives_are_noticed_or_mean_nothing(n, save, tmp_path):
    save(tmp_path / "a.npz", images=PLAIN, labels=np.arange(6))
    content, dice, n_read = (tmp_path / "a.npz").read_bytes(), random.Random(0), 0
    expected = read_archive(tmp_path / "a.npz")
    for _ in range(n):
        damaged = bytearray(content)
        damaged[dice.randrange(len(content))] ^= 1 << dice.randrange(8)
        (tmp_path / "b.npz").write_bytes(damaged)
        try:
            found = read_archive(tmp_path / "b.npz")
        except RefusedFile as error:
            assert "\n" not in str(error)
            continue
        n_read += 1
        assert all(np.array_equal(array, other) for array, other in zip(expected.values(), found.values(), strict=True))
    assert 0 < n_read < n / 3  # dates, attributes, names


def test_no_bit_of_an_archives_end_can_hide_an_array(tmp_path):
    np.savez(tmp_path / "a.npz", images=PLAIN, labels=np.arange(6))
    content = (tmp_path / "a.npz").read_bytes()
    for bit in range(8 * 22):
        damaged = bytearray(content)
        damaged[len(content) - 22 + bit // 8] ^= 1 << bit % 8
        (tmp_path / "b.npz").write_bytes(damaged)
        try:
            found = read_archive(tmp_path / "b.npz")
        except RefusedFile:
            continue
        assert sorted(found) == ["images", "labels"], bit


# --- labels


@pytest.mark.parametrize("label", [-1, 2**16, 2**31, 2**62, 2**63])
def test_labels_beyond_any_number_of_classes_are_refused(label, tmp_path):
    labels = np.array([0, 1, 2, label, 0, 1], np.uint64 if label >= 2**63 else np.int64)
    np.savez(tmp_path / "a.npz", images=PLAIN, labels=labels)
    assert "expected whole numbers from 0, below 65536" in refused(
        lambda p: load_images("folder", p), tmp_path / "a.npz"
    )


# --- memory


def test_memory_is_known_and_asked_for():
    there = memory.available_bytes()
    assert 1e8 < there < 1e15
    memory.require_memory(there / 2, "a thing", "make it smaller")
    with pytest.raises(
        InputError, match=r"^a thing: at least 1e\+09 TB|^a thing: at least 1.0e\+12 GB of memory, .* free"
    ):
        memory.require_memory(1e21, "a thing", "make it smaller")


GROUPS = [
    ("0::/\n", {"memory.max": "max\n", "memory.stat": "anon 5\n"}, float("inf")),
    ("0::/\n", {"memory.max": "1000\n", "memory.stat": "anon 400\nfile 500\n"}, 600),
    ("0::/job/step\n", {"job/memory.max": "1000\n", "job/step/memory.max": "max\n"}, 1000),
    ("0::/job/step\n", {"job/memory.max": "1000\n", "job/step/memory.max": "900\n"}, 900),
    ("0::/elsewhere\n", {"memory.max": "70\n", "memory.stat": "anon 80\n"}, 0),
    ("3:memory:/a\n1:cpu:/a\n", {"memory/a/memory.limit_in_bytes": "500", "memory/a/memory.stat": "total_rss 1"}, 499),
    ("", {}, float("inf")),
    ("0::/\n", {"memory.max": "odd\n"}, float("inf")),
]


@pytest.mark.parametrize(("own", "files", "expected"), GROUPS)
def test_limits_of_containers_and_jobs_count(own, files, expected, tmp_path, monkeypatch):
    real = memory.Path
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    (tmp_path / "own").write_text(own)
    versions = {
        name: (tmp_path / place.relative_to(memory._GROUPS), *rest) for name, (place, *rest) in memory._VERSIONS.items()
    }
    monkeypatch.setattr(memory, "_VERSIONS", versions)
    monkeypatch.setattr(memory, "Path", lambda path: tmp_path / "own" if "cgroup" in str(path) else real(path))
    assert min(memory._of_the_groups(), default=float("inf")) == expected
