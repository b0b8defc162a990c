"""Folders as people lay them out, through `load_images` as the command reads them."""

import numpy as np
import pytest
from PIL import Image

from harness.errors import InputError
from image_density_experiments.datasets import load_images
from image_density_experiments.pictures import ImageForm

RANDOM = np.random.default_rng(0)


def fill(root, *names, size=(8, 8), grey=False):
    """Different pictures under names such as train/cat/1.png."""
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        shape = size if grey else (*size, 3)
        Image.fromarray(RANDOM.integers(0, 256, shape, dtype=np.uint8)).save(path)
    return root


def numbered(pattern, n):
    return [pattern.format(index) for index in range(n)]


SPLITS = [
    *[
        (train, test)
        for train in ("train", "Train", "training")
        for test in ("test", "val", "valid", "validation", "VAL")
    ]
]


@pytest.mark.parametrize(("train", "test"), SPLITS)
def test_a_folder_may_have_its_own_split(tmp_path, train, test):
    fill(tmp_path, *numbered(train + "/{}.png", 4), *numbered(test + "/{}.jpg", 2))
    data = load_images("folder", tmp_path)
    assert data.train.names == numbered(train + "/{}.png", 4)
    assert data.test.names == numbered(test + "/{}.jpg", 2)


def test_test_goes_before_val_and_the_other_is_named(tmp_path):
    fill(tmp_path, "train/a.png", "val/b.png", "test/c.png")
    data = load_images("folder", tmp_path)
    assert data.test.names == ["test/c.png"]
    assert data.notes == ("val/ is left out: the test images are those of test/",)


LAYOUTS = {  # files; classes; training and test images with their classes
    "flat": (numbered("{}.png", 20), (), 18, 2),
    "nested without classes": (["0.png", *numbered("more/{}.png", 19)], (), 18, 2),
    "one folder in a folder": (numbered("img_align/img_align/{}.png", 10), (), 9, 1),
    "only train": (numbered("train/{}.png", 10), (), 9, 1),
    "classes": ([*numbered("cat/{}.png", 10), *numbered("dog/{}.png", 10)], ("cat", "dog"), 18, 2),
    "a class called train": ([*numbered("bus/{}.png", 10), *numbered("train/{}.png", 10)], ("bus", "train"), 18, 2),
    "classes in a folder": ([*numbered("set/b/{}.png", 5), *numbered("set/a/x/{}.png", 5)], ("a", "b"), 9, 1),
    "split of classes": (
        [*numbered("train/cat/{}.png", 3), *numbered("train/dog/{}.png", 3), "val/dog/0.png", "val/cat/0.png"],
        ("cat", "dog"),
        6,
        2,
    ),
    "a test class alone": (["train/cat/0.png", "train/dog/0.png", "test/dog/1.png"], ("cat", "dog"), 2, 1),
    "other test classes": (["train/cat/0.png", "train/dog/0.png", "test/cow/1.png"], (), 2, 1),
    "test without classes": (["train/cat/0.png", "train/dog/0.png", "test/1.png"], (), 2, 1),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(tmp_path, layout):
    files, classes, n_train, n_test = LAYOUTS[layout]
    fill(tmp_path, *files)
    data = load_images("folder", tmp_path)
    assert (len(data.train.images), len(data.test.images)) == (n_train, n_test)
    assert data.class_names == classes and data.n_classes == len(classes)
    assert {*data.train.names, *data.test.names} == set(files)
    for split in (data.train, data.test):
        if not classes:
            assert split.labels is None
            continue
        for name, label in zip(split.names, split.labels, strict=True):
            assert f"{classes[label]}/" in name


def test_hidden_files_and_folders_are_left_out(tmp_path):
    fill(tmp_path, *numbered("{}.png", 4), ".cache/1.png", "__MACOSX/1.png", ".hidden.png", "sub/.git/1.png")
    (tmp_path / "._0.png").write_bytes(b"what a Mac leaves beside a file")
    (tmp_path / "labels.csv").write_text("not a picture")
    (tmp_path / "folder.png").mkdir()
    data = load_images("folder", tmp_path)
    assert sorted([*data.train.names, *data.test.names]) == numbered("{}.png", 4)


@pytest.mark.parametrize("split", [False, True])
def test_copies_are_left_out_and_counted(tmp_path, split):
    folders = ("train/", "test/") if split else ("", "")
    fill(tmp_path, *numbered(folders[0] + "a{}.png", 12), *numbered(folders[1] + "b{}.png", 3))
    for number in range(2):  # a copy within the training images, and one on the other side of the split
        original = (tmp_path / folders[0] / f"a{number}.png").read_bytes()
        (tmp_path / folders[number] / f"c{number}.png").write_bytes(original)
    data = load_images("folder", tmp_path)
    names = [*data.train.names, *data.test.names]
    assert len(names) == 15 and not any("c0" in name or "c1" in name for name in names)
    assert data.notes == ("2 files that equal another one are left out",)


def test_a_test_folder_of_nothing_but_copies_is_refused(tmp_path):
    fill(tmp_path, "train/a.png", "train/b.png")
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "c.png").write_bytes((tmp_path / "train" / "a.png").read_bytes())
    with pytest.raises(InputError, match="every image equals one for training"):
        load_images("folder", tmp_path)


SIZES = [(218, 178), (64, 64), (48, 300), (33, 32)]  # CelebA, and what lies about


@pytest.mark.parametrize("size", [16, 32])
@pytest.mark.parametrize("grey", [False, True])
def test_pictures_of_any_sizes_become_squares(tmp_path, size, grey):
    for number, shape in enumerate(SIZES):
        fill(tmp_path, f"{number}.png", size=shape, grey=grey)
    with pytest.raises(InputError, match=r"300x48 pixels|64x64 pixels.* all images must have one size: --image_size S"):
        load_images("folder", tmp_path)
    data = load_images("folder", tmp_path, form=ImageForm(size=size))
    assert data.image_shape == (size, size, 1 if grey else 3)
    assert all(data.train.images[i].shape == data.image_shape for i in range(3))


def test_grey_pictures_have_one_channel_unless_asked_otherwise(tmp_path):
    fill(tmp_path, "a.png", "b.png", grey=True)
    shapes = [
        load_images("folder", tmp_path, form=ImageForm(channels=channels)).image_shape for channels in (None, 1, 3)
    ]
    assert shapes == [(8, 8, 1), (8, 8, 1), (8, 8, 3)]
    fill(tmp_path, "c.png")
    assert load_images("folder", tmp_path).image_shape == (8, 8, 3)
    assert load_images("folder", tmp_path, form=ImageForm(channels=1)).image_shape == (8, 8, 1)


def test_a_coloured_picture_among_grey_ones_found_late_is_named(tmp_path):
    fill(tmp_path, *numbered("{:03}.png", 450), grey=True)
    fill(tmp_path, "001.png")
    images = load_images("folder", tmp_path, form=ImageForm(size=4)).train.images
    with pytest.raises(InputError, match=r"001\.png: has colours, others are grey; choose with --channels 3"):
        [images[index] for index in range(3)]


def test_a_folder_without_pictures_says_what_it_holds(tmp_path):
    (tmp_path / "a.heic").write_bytes(b"")
    with pytest.raises(InputError, match=r"holds no images; it holds \.heic files; expected \.png"):
        load_images("folder", tmp_path)
    with pytest.raises(InputError, match="needs --dataroot, a folder of images or an array"):
        load_images("folder", tmp_path / "none")


def test_other_datasets_keep_their_form():
    with pytest.raises(InputError, match="--image_size and --channels are for own images"):
        load_images("patches", "unused", form=ImageForm(size=16))
    assert load_images("digits", "unused").image_shape == (8, 8, 1)
