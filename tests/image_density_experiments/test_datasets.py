"""Image datasets: made-up archives in the published formats, own images, and what is refused."""

import hashlib
import io
import tarfile

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


def test_images_of_several_sizes_are_refused(tmp_path):
    for name, size in (("a", 16), ("b", 8)):
        imsave(tmp_path / f"{name}.png", pictures(1, size=size)[0])
    with pytest.raises(InputError, match=r"b\.png: 8x8 pixels, but a\.png has 16x16"):
        load_images("folder", tmp_path)


@pytest.mark.parametrize(
    "array", [np.zeros((4, 8, 8), np.uint8), np.zeros((4, 8, 8, 3)), np.zeros((1, 8, 8, 3), np.uint8)]
)
def test_arrays_of_another_kind_are_refused(tmp_path, array):
    np.save(tmp_path / "a.npy", array)
    with pytest.raises(InputError, match=r"expected uint8 \(N, H, W, 3\), N at least 2"):
        load_images("folder", tmp_path / "a.npy")


def test_objects_in_an_array_file_are_never_loaded(tmp_path):
    np.save(tmp_path / "a.npy", np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(InputError, match=r"a\.npy: cannot be read as an array"):
        load_images("folder", tmp_path / "a.npy")
