"""Image datasets: made-up archives in the published formats, own images, and what is refused."""

import hashlib
import io
import pickle
import shutil
import struct
import tarfile
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imsave
from scipy.io import savemat

from harness.downloads import RemoteFile
from harness.errors import InputError
from image_density_experiments import datasets
from image_density_experiments.datasets import load_images

RANDOM = np.random.default_rng(0)


def pictures(n, size=32):
    return RANDOM.integers(0, 256, (n, size, size, 3), dtype=np.uint8)


def stated(path):
    content = path.read_bytes()
    return RemoteFile(
        url=f"http://127.0.0.1:9/{path.name}", sha256=hashlib.sha256(content).hexdigest(), size=len(content)
    )


@pytest.fixture
def cifar(tmp_path, monkeypatch):
    """A small archive in CIFAR-10's binary layout, its checksum taken for the published one."""
    images, labels = pictures(6), np.array([3, 1, 4, 1, 5, 9], np.uint8)
    path = tmp_path / "cifar-10-binary.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        names = [*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"]
        for name, image, label in zip(names, images, labels, strict=True):
            record = bytes([label]) + image.transpose(2, 0, 1).tobytes()  # colour planes
            info = tarfile.TarInfo(f"cifar-10-batches-bin/{name}.bin")
            info.size = len(record)
            archive.addfile(info, io.BytesIO(record))
    monkeypatch.setattr(datasets, "CIFAR10", stated(path))
    return path, images, labels


@pytest.mark.parametrize("as_file", [True, False])
def test_cifar10_is_read_from_its_binary_archive(cifar, as_file):
    path, images, labels = cifar
    data = load_images("cifar10", path if as_file else path.parent)
    assert np.array_equal(data.train.images, images[:5]) and np.array_equal(data.test.images, images[5:])
    assert data.train.labels.tolist() == labels[:5].tolist() and data.test.labels.tolist() == [9]
    assert (data.n_classes, data.shift, data.flip, data.image_shape) == (10, True, True, (32, 32, 3))


def test_an_archive_with_a_wrong_checksum_is_refused(cifar):
    path, *_ = cifar
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    with pytest.raises(InputError, match=r"cifar-10-binary\.tar\.gz: SHA-256 .* expected .*; the file is damaged"):
        load_images("cifar10", path.parent)


def test_a_download_that_fails_says_where_to_put_the_file(cifar, tmp_path, monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with pytest.raises(InputError, match=r"download of http://127.* failed .* put it into .*empty"):
        load_images("cifar10", tmp_path / "empty", allow_download=True)


def py2_pickle(images, labels):
    """A batch as Python 2 wrote it: the opcodes of the published files."""

    def text(value):
        return b"U" + bytes([len(value)]) + value

    def integer(value):
        return b"J" + struct.pack("<i", value)

    planes = images.transpose(0, 3, 1, 2).tobytes()
    array = (
        b"cnumpy.core.multiarray\n_reconstruct\nq\x01cnumpy\nndarray\nK\x00\x85" + text(b"b") + b"\x87Rq\x02("
        b"K\x01" + integer(len(images)) + integer(3072) + b"\x86cnumpy\ndtype\n" + text(b"u1") + b"K\x00K\x01\x87R"
        b"(K\x03" + text(b"|") + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89"
        b"T" + struct.pack("<i", len(planes)) + planes + b"tb"
    )
    numbers = b"](" + b"".join(b"K" + bytes([label]) for label in labels) + b"e"
    return (
        b"\x80\x02}q\x00("
        + text(b"batch_label")
        + text(b"training batch 1 of 5")
        + text(b"labels")
        + numbers
        + text(b"data")
        + array
        + text(b"filenames")
        + b"]("
        + text(b"a.png")
        + b"eu."
    )


def py3_pickle(protocol):
    """A batch as a later Python writes it."""

    def write(images, labels):
        planes = images.transpose(0, 3, 1, 2).reshape(len(images), -1).copy()
        return pickle.dumps({b"data": planes, "labels": [int(label) for label in labels]}, protocol)

    return write


PICKLES = {"python 2": py2_pickle, **{f"protocol {number}": py3_pickle(number) for number in (2, 3, 4)}}


def write_batches(folder, write, images, labels):
    folder.mkdir()
    for index, name in enumerate([*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"]):
        (folder / name).write_bytes(write(images[index : index + 1], labels[index : index + 1]))
    return folder


@pytest.mark.parametrize("written_by", PICKLES)
@pytest.mark.parametrize("place", ["archive", "folder of the archive", "unpacked", "parent of unpacked"])
def test_cifar10_is_read_from_its_python_version_without_running_it(tmp_path, monkeypatch, written_by, place):
    images, labels = pictures(6), np.array([3, 1, 4, 1, 5, 9], np.uint8)
    folder = write_batches(tmp_path / "cifar-10-batches-py", PICKLES[written_by], images, labels)
    archive = tmp_path / "cifar-10-python.tar.gz"
    if "archive" in place:
        with tarfile.open(archive, "w:gz") as tar:
            tar.add(folder, folder.name)
        shutil.rmtree(folder)
        monkeypatch.setattr(datasets, "CIFAR10_PYTHON", stated(archive))
    data = load_images("cifar10", {"archive": archive, "unpacked": folder}.get(place, tmp_path))
    assert np.array_equal(data.train.images, images[:5]) and np.array_equal(data.test.images, images[5:])
    assert data.train.labels.tolist() == labels[:5].tolist() and data.test.labels.tolist() == [9]


class Bomb:
    """Runs when it is unpickled."""

    def __reduce__(self):
        return (Path.touch, (Path("exploded"),))


HARMFUL = {
    "a call": lambda: {"data": Bomb(), "labels": []},
    "a call in a list": lambda: {"data": np.zeros((1, 3072), np.uint8), "labels": [Bomb()]},
    "a call as the state": lambda: {"data": [np.zeros(3, object)], "labels": []},
    "objects in the array": lambda: {"data": np.array([Bomb()], dtype=object), "labels": [1]},
    "no dict": lambda: [1, 2],
    "other numbers": lambda: {"data": np.zeros((1, 3072)), "labels": [1]},
    "too few labels": lambda: {"data": np.zeros((2, 3072), np.uint8), "labels": [1]},
}


@pytest.mark.parametrize("harm", HARMFUL)
def test_whatever_else_a_batch_holds_is_refused_and_never_run(tmp_path, monkeypatch, harm):
    monkeypatch.chdir(tmp_path)
    folder = write_batches(tmp_path / "cifar-10-batches-py", lambda *_: pickle.dumps(HARMFUL[harm](), 4), [], [])
    with pytest.raises(
        InputError, match=r"data_batch_1: not a batch of CIFAR-10; cifar-10-binary\.tar\.gz holds the same"
    ):
        load_images("cifar10", folder)
    assert not (tmp_path / "exploded").exists()


def test_damaged_batches_are_one_line(tmp_path):
    folder = write_batches(tmp_path / "cifar-10-batches-py", py2_pickle, pictures(6), np.arange(6))
    whole, random = (folder / "data_batch_1").read_bytes(), np.random.default_rng(0)
    for _ in range(100):
        content = bytearray(whole[: random.integers(0, len(whole))])
        for place in random.integers(0, min(200, len(whole)), 3):
            content[place : place + 1] = bytes([random.integers(256)])
        (folder / "data_batch_1").write_bytes(content)
        with pytest.raises(InputError, match=r"data_batch_1: not a batch of CIFAR-10; [^\n]*$"):
            load_images("cifar10", folder)


def test_cifar10_is_read_from_its_unpacked_binary_version(cifar, tmp_path):
    path, images, _ = cifar
    with tarfile.open(path) as archive:
        archive.extractall(tmp_path / "elsewhere", filter="data")
    data = load_images("cifar10", tmp_path / "elsewhere")
    assert np.array_equal(data.test.images, images[5:]) and data.class_names[3] == "cat"


def test_svhn_is_read_from_its_two_matlab_files(tmp_path, monkeypatch):
    images = pictures(5)
    for name, first, last in (("train", 0, 3), ("test", 3, 5)):
        path = tmp_path / f"{name}_32x32.mat"
        labels = np.arange(first, last) + 8  # 10 stands for the digit 0
        savemat(path, {"X": images[first:last].transpose(1, 2, 3, 0), "y": labels[:, None].astype(np.uint8)})
        monkeypatch.setattr(datasets, f"SVHN_{name.upper()}", stated(path))
    data = load_images("svhn", tmp_path)
    assert np.array_equal(data.train.images, images[:3]) and np.array_equal(data.test.images, images[3:])
    assert data.train.labels.tolist() == [8, 9, 0]
    assert (data.shift, data.flip) == (True, False)


def test_imagenet_is_read_from_its_npz_files_once(tmp_path):
    images = pictures(5, size=64)
    flat = images.transpose(0, 3, 1, 2).reshape(5, -1)
    for name, part in (("train_data_batch_1", [0, 1]), ("train_data_batch_2", [2, 3]), ("val_data", [4])):
        np.savez(tmp_path / f"{name}.npz", data=flat[part], labels=np.array(part) + 1)
    for name in ("train_data_batch_1 (copy)", "train_data_batch_", "train_data_batch_x", "my_train_data_batch_3"):
        (tmp_path / f"{name}.npz").write_bytes(b"a copy of the user's, none of the data's files")
    for _ in range(2):  # the second time from the unpacked arrays
        data = load_images("imagenet64", tmp_path)
        assert len(data.train.images) == 4
        assert all(np.array_equal(data.train.images[i], images[i]) for i in range(4))
        assert np.array_equal(data.test.images[0], images[4])
        assert data.train.labels.tolist() == [0, 1, 2, 3]
    with pytest.raises(InputError, match="remove it, it is made anew"):
        load_images("imagenet32", tmp_path)
    with pytest.raises(InputError, match=r"image-net\.org gives them out after registration"):
        load_images("imagenet32", tmp_path / "none", allow_download=True)


def test_patches_of_train_and_test_do_not_overlap():
    data = load_images("patches", "unused")
    assert (len(data.train.images), len(data.test.images)) == (6100, 350)
    train_rows = {image[row].tobytes() for image in data.train.images for row in range(32)}
    shared = sum(image[row].tobytes() in train_rows for image in data.test.images for row in range(32))
    assert shared == 0
    assert set(data.train.labels) == set(data.test.labels) == {0, 1}


def test_a_folder_of_images_is_split_or_has_its_own_split(tmp_path):
    images = pictures(12, size=8)
    for index, image in enumerate(images):
        imsave(tmp_path / f"{index:02d}.png", image)
    data = load_images("folder", tmp_path)
    assert (len(data.train.images), len(data.test.images)) == (11, 1)
    assert np.array_equal(data.test.images[0], images[9]) and np.array_equal(data.train.images[9], images[10])
    for name, image in (("train", images[0]), ("test", images[1])):
        (tmp_path / "own" / name).mkdir(parents=True)
        imsave(tmp_path / "own" / name / "a.png", image)
    data = load_images("folder", tmp_path / "own")
    assert np.array_equal(data.train.images[0], images[0]) and np.array_equal(data.test.images[0], images[1])


@pytest.mark.parametrize("suffix", ["npy", "npz"])
def test_an_array_of_images_is_split(tmp_path, suffix):
    images, path = pictures(21, size=4), tmp_path / f"images.{suffix}"
    (np.save if suffix == "npy" else np.savez)(path, images)
    data = load_images("folder", path)
    assert [len(data.train.images), len(data.test.images)] == [19, 2]
    assert np.array_equal(data.test.images[1], images[19]) and np.array_equal(data.train.images[18], images[20])


@pytest.mark.parametrize("empty", [("x_train", "y_train"), ("x_test", "y_test"), ("y_test",), ("x_test",)])
def test_arrays_of_nothing_are_one_line(tmp_path, empty):
    arrays = {"x_train": pictures(4, 8), "y_train": np.arange(4), "x_test": pictures(3, 8), "y_test": np.arange(3)}
    np.savez(tmp_path / "own.npz", **{name: array[:0] if name in empty else array for name, array in arrays.items()})
    with pytest.raises(InputError, match=r"own\.npz: .*expected"):
        load_images("folder", tmp_path / "own.npz")


def test_a_corrupted_image_is_named(tmp_path):
    for name in ("a", "b", "c"):
        imsave(tmp_path / f"{name}.png", pictures(1, size=16)[0])
    whole = (tmp_path / "b.png").read_bytes()
    (tmp_path / "b.png").write_bytes(whole[: len(whole) // 2])  # the header is intact
    images = load_images("folder", tmp_path).train.images
    with pytest.raises(InputError, match=r"b\.png: cannot be read as an image .*mend or remove it"):
        [images[index] for index in range(2)]
    (tmp_path / "b.png").write_bytes(b"nothing of an image")
    with pytest.raises(InputError, match=r"b\.png: cannot be read as an image"):
        load_images("folder", tmp_path)


def test_objects_in_an_array_file_are_never_loaded(tmp_path):
    np.save(tmp_path / "a.npy", np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(InputError, match=r"a\.npy: cannot be read as an array"):
        load_images("folder", tmp_path / "a.npy")
