"Pictures in folders: which are read, which are named, and what is said of the others."

import unicodedata

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import ImageFolder
from torchvision.transforms import Compose, Resize, ToTensor

from fisher_unlearn.images.folders import positions_of, read_folder, read_list


def picture(path, seed, size=(12, 9), mode="RGB"):
    "A picture of noise in a file."
    path.parent.mkdir(parents=True, exist_ok=True)
    shape = (size[1], size[0], 3) if mode == "RGB" else (size[1], size[0])
    pixels = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    Image.fromarray(pixels).save(path)


@pytest.fixture
def photos(tmp_path):
    "Six pictures of two kinds."
    for seed in range(6):
        picture(tmp_path / "photos" / ("cat", "dog")[seed % 2] / f"{seed}.png", seed)
    return tmp_path / "photos"


def test_it_reads_what_torchvision_reads(photos):
    "Files, order, labels, and pixels, resized; grey and in any format."
    picture(photos / "cat" / "grey.jpg", 7, (20, 20), "L")
    picture(photos / "dog" / "deep" / "x.bmp", 8, (8, 8))
    (photos / "cat" / "notes.txt").write_text("no image")
    found = read_folder(photos, size=8)
    theirs = ImageFolder(photos, Compose([Resize((8, 8)), ToTensor()]))
    names = [path.removeprefix(f"{photos}/") for path, _ in theirs.samples]
    assert sorted(found.files) == sorted(names) and found.images.classes == ("cat", "dog")
    order = [names.index(name) for name in found.files]
    inputs, labels = next(iter(found.images.train.batches(99)))
    assert labels.tolist() == [theirs[place][1] for place in order]
    assert torch.allclose(inputs, torch.stack([theirs[place][0] for place in order]), atol=1e-6)


def test_training_and_test_images_are_told_apart(photos, tmp_path):
    whole = tmp_path / "whole"
    for part, seeds in (("train", range(6)), ("val", range(6, 9))):
        for seed in seeds:
            picture(whole / part / ("cat", "dog")[seed % 2] / f"{seed}.png", seed)
    found = read_folder(whole)
    assert (len(found.images.train), len(found.images.test), found.images.name) == (6, 3, "whole")
    other = read_folder(photos, test=whole / "val")
    assert len(other.images.test) == 3
    assert torch.equal(other.images.train.images, found.images.train.images)


@pytest.mark.parametrize("channels, mean", [(1, (0.5,)), (3, (0.1, 0.2, 0.3)), (3, (0.5,))])
def test_pixels_are_normalised_as_asked(photos, channels, mean):
    found = read_folder(photos, size=8, channels=channels, mean=mean, std=(0.5,)).images.train
    plain = read_folder(photos, size=8, channels=channels).images.train
    shift = torch.tensor(mean).view(1, -1, 1, 1)
    (given, _), (raw, _) = (next(iter(part.batches(9))) for part in (found, plain))
    assert torch.allclose(given, (raw - shift) / 0.5, atol=1e-5)


def broken(photos):
    for name in ("a", "b", "c", "d"):
        (photos / "cat" / f"{name}.png").write_bytes(b"\x89PNG\r\n\x1a\nrest")
    return photos, {}


def one_class(photos):
    for path in (photos / "dog").iterdir():
        path.unlink()
    (photos / "dog").rmdir()
    return photos, {}


def empty_class(photos):
    (photos / "cow").mkdir()
    return photos, {}


def stray_test(photos):
    picture(photos.parent / "held" / "cats" / "1.png", 1)
    picture(photos.parent / "held" / "dog" / "1.png", 1)
    return photos, {"test": photos.parent / "held"}


WRONG = {
    "4 of 10 files": broken,
    "has only cat": one_class,
    "holds no image": empty_class,
    "the nearest is 'cat'": stray_test,
    "there is no folder": lambda photos: (photos / "none", {}),
    "has none": lambda photos: (photos / "cat", {}),
    "`channels` is 2": lambda photos: (photos, {"channels": 2}),
    "`mean` has 2 values": lambda photos: (photos, {"mean": (0.1, 0.2)}),
}


@pytest.mark.parametrize("message", WRONG)
def test_what_is_no_folder_of_images_is_refused_in_a_sentence(photos, message):
    place, given = WRONG[message](photos)
    with pytest.raises((ValueError, FileNotFoundError)) as refused:
        read_folder(place, **given)
    assert message in str(refused.value) and "\n" not in str(refused.value)
    assert str(refused.value).endswith(".")


def test_files_that_are_broken_are_named_and_no_more_than_three(photos):
    place, _ = broken(photos)
    with pytest.raises(ValueError, match="cat/a.png.*cat/b.png.*cat/c.png.*and others") as refused:
        read_folder(place)
    assert "cat/d.png" not in str(refused.value)


def test_a_file_is_found_by_any_path_that_leads_to_it(photos, monkeypatch):
    found = read_folder(photos)
    monkeypatch.chdir(photos)
    ways = ["cat/2.png", str(photos / "cat" / "2.png"), "photos/cat/2.png", "./cat/2.png"]
    assert positions_of(found, ways) == [found.files.index("cat/2.png")]
    with pytest.raises(ValueError, match="did you mean 'cat/2.png'?"):
        positions_of(found, ["cat/22.png"])
    with pytest.raises(ValueError, match="no training image"):
        positions_of(found, ["/etc/passwd"])


def test_images_may_be_links_and_are_named_as_they_lie(photos, tmp_path):
    linked = tmp_path / "linked"
    for file in photos.rglob("*.png"):
        (place := linked / file.relative_to(photos)).parent.mkdir(parents=True, exist_ok=True)
        place.symlink_to(file)
    found = read_folder(linked)
    assert found.files == read_folder(photos).files
    assert positions_of(found, ["cat/2.png", str(linked / "dog" / "1.png")]) == [
        found.files.index("cat/2.png"),
        found.files.index("dog/1.png"),
    ]


def test_a_class_of_hidden_files_and_folders_alone_has_no_image(photos):
    picture(photos / "cow" / ".hidden.png", 1)
    (photos / "cow" / "folder.png").mkdir()
    with pytest.raises(ValueError, match="holds no image"):
        read_folder(photos)


def test_copies_in_hidden_folders_are_passed_over(photos):
    before = read_folder(photos).files
    picture(photos / "cat" / ".ipynb_checkpoints" / "0-checkpoint.png", 0)
    picture(photos / "cat" / "deep" / ".trash" / "deeper" / "0.png", 0)
    assert read_folder(photos).files == before
    hidden = photos.parent / ".hidden"
    photos.rename(hidden)
    assert read_folder(hidden).files == before


@pytest.mark.parametrize(
    "mode, ending, kind",
    [("I;16", "png", np.uint16), ("I", "tiff", np.int32), ("F", "tiff", np.float32)],
)
def test_pictures_of_more_than_8_bits_are_refused_and_named(photos, mode, ending, kind):
    Image.fromarray(np.full((6, 6), 300, kind)).save(photos / "cat" / f"deep.{ending}")
    with pytest.raises(ValueError, match=f"cat/deep.{ending} .*mode {mode[0]}.* 8 bits") as refused:
        read_folder(photos)
    assert "1 of 7 files" in str(refused.value)


def test_a_picture_that_is_too_large_is_named(photos, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 200)
    picture(photos / "cat" / "large.png", 1, (30, 30))
    with pytest.raises(ValueError, match="cat/large.png .*exceeds limit"):
        read_folder(photos)


def test_a_class_may_be_called_train(tmp_path):
    for name in ("bus", "car", "train"):
        picture(tmp_path / "vehicles" / name / "1.png", len(name))
    found = read_folder(tmp_path / "vehicles")
    assert found.images.classes == ("bus", "car", "train")
    assert found.images.name == "vehicles"


def test_parts_without_classes_are_no_classes(tmp_path):
    for name in ("test", "train"):
        picture(tmp_path / "photos" / name / "1.png", len(name))
    with pytest.raises(ValueError, match="photos/train must hold a folder .* has none"):
        read_folder(tmp_path / "photos")


@pytest.mark.parametrize("written, asked", [("NFD", "NFC"), ("NFC", "NFD")])
def test_a_name_is_found_however_its_accents_are_written(photos, written, asked):
    lies, wanted = (unicodedata.normalize(form, "cat/café.png") for form in (written, asked))
    picture(photos / lies, 1)
    found = read_folder(photos)
    assert positions_of(found, [wanted]) == [found.files.index(lies)]
    picture(photos / wanted, 2)
    found = read_folder(photos)
    assert positions_of(found, [wanted]) == [found.files.index(wanted)]
    assert positions_of(found, [lies]) == [found.files.index(lies)]


@pytest.mark.parametrize(
    "content, said",
    [
        (None, "No such file"),
        ("caf\u00e9.png".encode("latin-1"), "can't decode"),
        ("cat/0.png".encode("utf-16"), "can't decode"),
        (b"a" * 200_000, "field larger"),
    ],
)
def test_lists_that_cannot_be_read_are_refused_in_a_sentence(tmp_path, content, said):
    path = tmp_path / "list.csv"
    if content is not None:
        path.write_bytes(content)
    for place, why in ((path, said), (tmp_path, "directory")):
        with pytest.raises(ValueError, match=f"can't be read as a list .*{why}.*UTF-8") as refused:
            read_list(place)
        assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "text, names",
    [
        ("cat/0.png\ndog/1.png\n", ["cat/0.png", "dog/1.png"]),
        ("file\ncat/0.png\n\n", ["cat/0.png"]),
        ('why,path\nasked,cat/0.png\nasked,"a,b.png"\n', ["cat/0.png", "a,b.png"]),
        ("\ufeffFilename,label\r\ncat/0.png,3\r\n", ["cat/0.png"]),
    ],
)
def test_lists_of_files(tmp_path, text, names):
    (path := tmp_path / "list.csv").write_text(text, encoding="utf-8", newline="")
    assert read_list(path) == names


@pytest.mark.parametrize(
    "text, said",
    [("", "names no file"), ("file\n", "names no file"), ("a,b\n1,2\n", "isn't clear")],
)
def test_lists_that_name_nothing(tmp_path, text, said):
    (path := tmp_path / "list.csv").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=said):
        read_list(path)
