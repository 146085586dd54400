# SPDX-License-Identifier: MIT
"""Labels, data sets on disk, loading and metrics."""

import hashlib
import http.server
import io
import json
import math
import threading
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import average_precision_score
from torch.utils.data import DataLoader

import common
from common import InputError

# ------------------------------------------------------------------------------------------ labels


def full_labels(rows=50, classes=8):
    return np.random.default_rng(0).choice(np.array([-1, 1], np.int8), (rows, classes))


def test_hide_entries_is_the_published_mask():
    y = full_labels()
    keep = np.random.RandomState(3).random_sample(y.shape) < 0.3
    hidden = common.hide_entries(y, 0.3, 3)
    assert hidden.dtype == np.int8 and ((hidden == y) == keep).all() and (hidden[~keep] == 0).all()


def test_known_fractions_of_the_voc2007_geometry():
    y = np.ones((5011, 20), np.int8)
    known = {k: (common.hide_entries(y, k, 0) != 0).mean() for k in (0.1, 0.5)}
    assert known[0.1] == pytest.approx(0.100858, abs=5e-7)
    assert known[0.5] == pytest.approx(0.500529, abs=5e-7)


def test_masks_are_nested_and_pure():
    y = full_labels()
    before, state = y.copy(), np.random.get_state()[1].copy()
    masks = [common.hide_entries(y, k / 10, 0) != 0 for k in range(1, 11)]
    assert all((a <= b).all() for a, b in zip(masks, masks[1:], strict=False)) and masks[-1].all()
    images = [(common.hide_images(y, k / 10, 1) != 0).all(1) for k in range(1, 11)]
    assert all((a <= b).all() for a, b in zip(images, images[1:], strict=False))
    assert [m.sum() for m in images] == [5 * k for k in range(1, 11)]
    assert (y == before).all() and (np.random.get_state()[1] == state).all()


def test_hide_images_keeps_the_first_of_the_permutation():
    y = full_labels()
    kept = np.random.RandomState(1).permutation(50)[:10]
    hidden = common.hide_images(y, 0.2, 1)
    assert (hidden[kept] == y[kept]).all() and (np.delete(hidden, kept, 0) == 0).all()


def test_mask_hash_sees_the_mask_and_not_the_labels():
    y = common.hide_entries(full_labels(), 0.5, 0)
    assert common.mask_hash(y) == common.mask_hash(-y) != common.mask_hash(np.ones_like(y))
    assert len(common.mask_hash(y)) == 8


@pytest.mark.parametrize("value", [2, -2, math.nan, 0.5])
def test_wrong_label_is_named_with_file_and_row(value):
    y = np.zeros((4, 3))
    y[2, 1] = value
    with pytest.raises(InputError, match="labels.csv.*row 2"):
        common.check_labels(y, 3, "labels.csv")
    with pytest.raises(InputError, match="shape"):
        common.check_labels(np.zeros((4, 2)), 3, "labels.csv")


# --------------------------------------------------------------------------------------- data sets


def picture(path, mode="RGB", size=(20, 16)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, 128).save(path)


@pytest.fixture
def coco(tmp_path):
    """Three images a part: a crowd, one without annotation, ids out of order."""
    (tmp_path / "annotations").mkdir()
    for part, first in (("train2014", 9), ("val2014", 90)):
        images = [
            {"id": first - k, "file_name": f"COCO_{part}_{first - k:012}.jpg"} for k in range(3)
        ]
        for image in images:
            picture(tmp_path / part / image["file_name"])
        annotations = [
            {"id": 1, "image_id": first, "category_id": 90, "iscrowd": 1},
            {"id": 2, "image_id": first, "category_id": 1, "iscrowd": 0},
            {"id": 3, "image_id": first - 2, "category_id": 1, "iscrowd": 0},
            {"id": 4, "image_id": first - 2, "category_id": 1, "iscrowd": 0},
        ]
        categories = [{"id": 90, "name": "toothbrush"}, {"id": 1, "name": "person"}]
        spec = {"images": images, "annotations": annotations, "categories": categories}
        path = tmp_path / "annotations" / f"instances_{part}.json"
        path.write_text(json.dumps(spec))
    return tmp_path


def test_coco_replica(coco):
    data = common.load_data("coco", str(coco))
    assert data.classes == ["person", "toothbrush"]
    assert data.train.y.tolist() == [[1, 1], [-1, -1], [1, -1]]
    assert [i[-5] for i in data.train.ids] == ["9", "8", "7"]
    assert len(common.load_data("coco", str(coco), limit=2).train.y) == 2


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def test_coco_with_broken_files_names_them(coco):
    image = sorted((coco / "train2014").iterdir())[0]
    whole = image.read_bytes()
    for breakage in (lambda: image.write_bytes(b""), lambda: image.write_text("x"), image.unlink):
        breakage()
        with pytest.raises(InputError, match=image.name):
            common.load_data("coco", str(coco))
    image.write_bytes(whole)
    path = coco / "annotations" / "instances_val2014.json"
    for text in ("[]", "{}", path.read_text()[:40], path.read_text().replace("id", "idd")):
        path.write_text(text)
        with pytest.raises(InputError, match="instances_val2014.json"):
            common.load_data("coco", str(coco))
    path.unlink()
    with pytest.raises(InputError, match="instances_val2014.json"):
        common.load_data("coco", str(coco))


def test_image_that_breaks_while_decoding_is_named_through_a_worker(coco):
    image = sorted((coco / "train2014").iterdir())[0]
    Image.effect_noise((200, 200), 50).convert("RGB").save(image)
    truncate(image)
    data = common.load_data("coco", str(coco))  # the header is whole
    dataset = common.ImageDataset(data.train.images, data.train.y, [common.test_transform(32)], 0)
    sampler = common.EpochSampler(np.arange(3), 3)
    loader = DataLoader(dataset, batch_sampler=sampler, num_workers=1)
    with pytest.raises(InputError, match=image.name):
        next(iter(loader))


@pytest.fixture
def voc(tmp_path):
    base = tmp_path / "VOCdevkit" / "VOC2007"
    (base / "ImageSets" / "Main").mkdir(parents=True)
    (base / "Annotations").mkdir()
    for part, name in (("trainval", "000005"), ("test", "000001")):
        (base / "ImageSets" / "Main" / f"{part}.txt").write_text(f"{name}\n")
        picture(base / "JPEGImages" / f"{name}.jpg")
        objects = "".join(
            f"<object><name>{c}</name><difficult>{d}</difficult></object>"
            for c, d in (("chair", 0), ("chair", 1), ("dog", 1))
        )
        (base / "Annotations" / f"{name}.xml").write_text(f"<annotation>{objects}</annotation>")
    return tmp_path


def test_voc_replica_counts_difficult_as_absent(voc):
    data = common.load_data("voc2007", str(voc))
    assert len(data.classes) == 20 and data.classes == sorted(data.classes)
    assert [data.classes[c] for c in np.flatnonzero(data.train.y[0] == 1)] == ["chair"]
    assert (data.train.y[0] == -1).sum() == 19


def test_voc_with_broken_files_names_them(voc):
    base = voc / "VOCdevkit" / "VOC2007"
    path = base / "Annotations" / "000005.xml"
    text = path.read_text()
    for broken in (text[:30], text.replace("chair", "unicorn")):
        path.write_text(broken)
        with pytest.raises(InputError, match="000005.xml"):
            common.load_data("voc2007", str(voc))
    path.write_text(text)
    (base / "ImageSets" / "Main" / "test.txt").unlink()
    with pytest.raises(InputError, match="test.txt"):
        common.load_data("voc2007", str(voc))


def test_voc2012_has_its_own_splits(voc):
    (voc / "VOCdevkit" / "VOC2007").rename(voc / "VOCdevkit" / "VOC2012")
    main = voc / "VOCdevkit" / "VOC2012" / "ImageSets" / "Main"
    (main / "trainval.txt").rename(main / "train.txt")
    (main / "test.txt").rename(main / "val.txt")
    data = common.load_data("voc2012", str(voc))
    assert data.train.ids == ["000005"] and data.test.ids == ["000001"]


def test_nuswide_replica(tmp_path):
    labels = tmp_path / "Groundtruth" / "TrainTestLabels"
    labels.mkdir(parents=True)
    (tmp_path / "ImageList").mkdir()
    for part, column in (("Train", "1\n0 \n\n"), ("Test", "0\n1 \n")):
        names = [f"animal\\{part}_{k}_9.jpg" for k in range(2)]
        (tmp_path / "ImageList" / f"{part}Imagelist.txt").write_text("\n".join(names) + "\n\n")
        for concept in ("water", "airport"):
            (labels / f"Labels_{concept}_{part}.txt").write_text(column)
        for name in names:
            picture(tmp_path / "Flickr" / name.replace("\\", "/"))
    data = common.load_data("nuswide", str(tmp_path))
    assert data.classes == ["airport", "water"]
    assert data.train.y.tolist() == [[1, 1], [-1, -1]] and data.test.y[0].tolist() == [-1, -1]
    (tmp_path / "Flickr" / "animal" / "Train_1_9.jpg").unlink()
    with pytest.raises(InputError, match="1 of 2 images cannot be read.*Train_1"):
        common.load_data("nuswide", str(tmp_path))
    (labels / "Labels_water_Train.txt").write_text("1\n")
    with pytest.raises(InputError, match="Labels_water_Train.txt.*1 labels for 2 images"):
        common.load_data("nuswide", str(tmp_path))


def test_cub_replica(tmp_path):
    base = tmp_path / "CUB_200_2011"
    (base / "attributes").mkdir(parents=True)
    (tmp_path / "attributes.txt").write_text("1 has_bill_shape::curved_(up_or_down)\n2 has_eye\n")
    files = ["001.Black_footed_Albatross/a b.jpg", "001.Black_footed_Albatross/c.jpg"]
    (base / "images.txt").write_text("".join(f"{k} {f}\n" for k, f in enumerate(files, 1)))
    (base / "train_test_split.txt").write_text("1 0\n2 1\n")
    (base / "attributes" / "image_attribute_labels.txt").write_text(
        "1 1 1 3 2.5\n1 2 0 4 1.0\n2 1 0 3 0 27.7\n2 2 1 1 0.5\n"
    )
    for name in files:
        picture(base / "images" / name)
    data = common.load_data("cub", str(tmp_path))
    assert data.classes == ["has_bill_shape::curved_(up_or_down)", "has_eye"]
    assert data.train.y.tolist() == [[-1, 1]] and data.test.y.tolist() == [[1, -1]]
    assert data.test.ids == ["001.Black_footed_Albatross/a b.jpg"]


def test_vg200_replica(tmp_path, monkeypatch):
    monkeypatch.setattr(common, "VG_TEST", 2)
    images = []
    for k in range(6):
        rare = [[f"rare{n:03}"] for n in range(250 if k < 4 else 0)]
        names = [["man"], ["Man ", "tree"]] if k % 2 else rare
        url = f"https://cs.stanford.edu/people/rak248/VG_100K{'_2' * (k % 2)}/{k}.jpg"
        objects = [{"names": n, "object_id": 1} for n in names]
        images.append({"image_id": k, "objects": objects, "image_url": url})
        picture(tmp_path / f"VG_100K{'_2' * (k % 2)}" / f"{k}.jpg")
    (tmp_path / "objects.json").write_text(json.dumps(images))
    data = common.load_data("vg200", str(tmp_path))
    assert len(data.classes) == 200 and {"man", "tree", "rare000"} <= set(data.classes)
    assert "rare198" not in data.classes  # ties: the alphabet
    assert len(data.test.y) == 2 and set(data.train.ids).isdisjoint(data.test.ids)
    man = data.train.y[:, data.classes.index("man")] == 1
    assert man.tolist() == ["_2" in i for i in data.train.ids]


@pytest.fixture
def folder(tmp_path):
    for name in ("a b.jpg", "c.png", "d.jpg"):
        picture(tmp_path / "my images" / name)
    (tmp_path / "classes.txt").write_text("cat\nhot dog\nDürer\n\n", encoding="utf-8")
    train = '"my images/a b.jpg",cat;-hot dog\n\nmy images/c.png, Dürer ; cat\n'
    (tmp_path / "train.csv").write_text(train, encoding="utf-8-sig")
    (tmp_path / "test.csv").write_text("my images/d.jpg,hot dog\n")
    return tmp_path


def test_folder_of_ones_own(folder):
    data = common.load_data("folder", str(folder))
    assert data.classes == ["cat", "hot dog", "Dürer"]
    assert data.train.y.tolist() == [[1, -1, 0], [1, 0, 1]]
    assert data.test.y.tolist() == [[-1, 1, -1]]


@pytest.mark.parametrize(
    ("file", "text", "word"),
    [
        ("train.csv", b"my images/d.jpg,unicorn\n", "line 1: unicorn is not in classes.txt"),
        ("train.csv", b"my images/d.jpg,cat;-cat\n", "line 1: cat is both"),
        ("train.csv", b"my images/d.jpg,cat\nmy images/d.jpg,cat\n", "line 2"),
        ("train.csv", b"my images/d.jpg\n", "line 1"),
        ("train.csv", b"a.jpg,cat,hot dog\n", "line 1"),
        ("train.csv", b"nowhere.jpg,cat\n", "nowhere.jpg"),
        ("train.csv", b"\xff\xfe,cat\n", "train.csv"),
        ("train.csv", b"", "no image"),
        ("test.csv", None, "test.csv"),
        ("classes.txt", b"cat\ncat\n", "cat is there twice"),
        ("classes.txt", None, "classes.txt"),
    ],
)
def test_folder_with_mistakes_names_file_and_line(folder, file, text, word):
    (folder / file).unlink() if text is None else (folder / file).write_bytes(text)
    with pytest.raises(InputError, match=word) as error:
        common.load_data("folder", str(folder))
    assert "\n" not in str(error.value)


def test_wrong_counts_are_a_warning_with_both_numbers(voc, capsys):
    common.load_data("voc2007", str(voc))
    assert "(1, 1) train and test images, not (5011, 4952)" in capsys.readouterr().err


# --------------------------------------------------------------------------------------- downloads


@pytest.fixture
def server(coco, tmp_path_factory, monkeypatch):
    """COCO's host on this machine. `flaws` lists what goes wrong with the next answers."""
    flaws, files, asked = [], {}, []
    for address in common.COCO_ARCHIVES:
        name, content = Path(address).stem, io.BytesIO()
        with zipfile.ZipFile(content, "w") as archive:
            for path in sorted(coco.rglob("*")):
                inside = "annotations" if "trainval" in name else name
                if path.is_file() and path.parent.name == inside:
                    archive.write(path, path.relative_to(coco))
        files[f"/{address}"] = content.getvalue()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            body, flaw = files[self.path], flaws.pop(0) if flaws else ""
            begin = int(self.headers.get("Range", "bytes=0-")[6:-1])
            asked.append((self.path, begin))
            if begin >= len(body):
                return self.send_error(416)
            self.send_response(206)
            self.send_header("Content-Length", str(len(body) - begin))
            self.end_headers()
            sent = body[begin:]
            if flaw == "breaks":
                sent = sent[: len(sent) // 2]
            self.wfile.write(bytes(len(sent)) if flaw == "wrong" else sent)

        def log_message(self, *_):
            pass

    host = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=host.serve_forever, daemon=True).start()
    monkeypatch.setattr(common, "COCO", f"http://127.0.0.1:{host.server_port}")
    sums = {address[1:]: hashlib.md5(body).hexdigest() for address, body in files.items()}
    monkeypatch.setattr(common, "COCO_ARCHIVES", sums)
    root = tmp_path_factory.mktemp("new")
    yield SimpleNamespace(flaws=flaws, files=files, asked=asked, root=root)
    host.shutdown()
    host.server_close()


def test_download_survives_a_broken_connection_and_a_wrong_checksum(server):
    server.flaws += ["breaks", "", "wrong"]
    data = common.load_data("coco", str(server.root / "coco"), fetch=True)
    assert data.classes == ["person", "toothbrush"]
    first, second = server.asked[:2]
    assert first[1] == 0 < second[1] and first[0] == second[0]  # it went on where it broke
    assert [begin for _, begin in server.asked[2:]] == [0, 0, 0]  # what was wrong came anew
    number = len(server.asked)
    common.load_data("coco", str(server.root / "coco"), fetch=True)
    assert len(server.asked) == number and not list(server.root.rglob("*.zip"))


def test_download_gives_up_with_the_address(server):
    server.flaws += ["wrong"] * 5
    with pytest.raises(InputError, match="train2014.zip cannot be fetched: its md5 is wrong"):
        common.load_data("coco", str(server.root), fetch=True)


def test_download_writes_nothing_outside_the_root_and_refuses_a_full_disk(server, monkeypatch):
    content, address = io.BytesIO(), "zips/train2014.zip"
    with zipfile.ZipFile(content, "w") as archive:
        archive.writestr("../outside.txt", "x")
    server.files[f"/{address}"] = content.getvalue()
    common.COCO_ARCHIVES[address] = hashlib.md5(content.getvalue()).hexdigest()
    root = server.root / "coco"
    root.mkdir()
    common.fetch_archive(f"{common.COCO}/{address}", root, common.COCO_ARCHIVES[address])
    assert [p.name for p in server.root.rglob("*.txt")] == ["outside.txt"]
    assert (root / "outside.txt").exists()
    monkeypatch.setattr(common.shutil, "disk_usage", lambda _: SimpleNamespace(free=10))
    with pytest.raises(InputError, match="make room"):
        common.load_data("coco", str(server.root / "other"), fetch=True)


@pytest.mark.parametrize(
    ("name", "word"), [("cub", "1.1 GB"), ("vg200", "VG_100K"), ("nuswide", "30 GB")]
)
def test_what_cannot_be_downloaded_says_where_it_is(name, word, tmp_path):
    with pytest.raises(InputError, match=word) as error:
        common.load_data(name, str(tmp_path), fetch=True)
    assert "--download cannot fetch" in str(error.value)


def test_voc_comes_through_torchvision(voc, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(common, "VOCDetection", lambda *a, **k: asked.append((a[1:], k)))
    assert len(common.load_data("voc2007", str(voc), fetch=True).train.y) == 1
    assert asked == [(("2007", part), {"download": True}) for part in ("trainval", "test")]


def test_toy_world_is_the_same_every_time_and_follows_its_contexts():
    scenes = getattr(common.toy_scenes, "__wrapped__", common.toy_scenes)
    (images, y, contexts), again = scenes(300, 7), scenes(300, 7)
    assert all((a == b).all() for a, b in zip((images, y, contexts), again, strict=True))
    assert images.shape == (300, 64, 64, 3) and images.dtype == np.uint8
    home = np.repeat(np.arange(4), 4)
    inside = contexts[:, None] == home
    assert (y[inside] == 1).mean() > 0.5 and (y[~inside] == 1).mean() < 0.1
    assert not (scenes(300, 8)[0] == images).all()


# ----------------------------------------------------------------------------------------- loading


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "1", "RGBA", "LA", "CMYK", "I;16"])
def test_images_of_any_mode_are_images(mode, tmp_path):
    path = tmp_path / ("image.jpg" if mode == "CMYK" else "image.png")
    picture(path, mode)
    x = common.train_transform(32, (512, 256))(common.open_image(str(path)))
    assert x.shape == (3, 32, 32) and x.dtype == torch.uint8


def test_16_bits_are_scaled_and_not_clipped(tmp_path):
    grey = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    Image.fromarray(grey).save(tmp_path / "x.png")
    assert (np.asarray(common.open_image(tmp_path / "x.png"))[..., 0] == grey >> 8).all()


def batches(workers, epoch=1):
    images, y, _ = common.toy_scenes(20, 3)
    views = [common.train_transform(64, (512, 256))]
    dataset = common.ImageDataset(images, y, views, seed=5)
    sampler = common.EpochSampler(np.arange(20), 10, seed=5)
    sampler.epoch = epoch
    return list(DataLoader(dataset, batch_sampler=sampler, num_workers=workers))


def test_batches_hang_on_seed_and_epoch_and_not_on_workers():
    alone, together, later = batches(0), batches(2), batches(0, epoch=2)
    for a, b in zip(alone, together, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    assert not torch.equal(alone[0][2], later[0][2])
    assert sorted(torch.cat([b[2] for b in alone]).tolist()) == list(range(20))


def test_augmentation_leaves_the_global_generator_alone():
    images, y, _ = common.toy_scenes(20, 3)
    views = [common.train_transform(64, (512, 256))]
    dataset = common.ImageDataset(images, y, views, seed=5)
    before = torch.get_rng_state()
    assert not torch.equal(dataset[1, 0][0], dataset[2, 0][0])
    assert torch.equal(before, torch.get_rng_state())


# ----------------------------------------------------------------------------------------- metrics


def literal_average_precision(score, truth, interpolated):
    """One threshold for each distinct score; interpolated: best precision from this recall up."""
    points = []
    for t in sorted(set(score), reverse=True):
        said = score >= t
        points.append(((said & truth).sum() / truth.sum(), (said & truth).sum() / said.sum()))
    area, last = 0.0, 0.0
    for k, (recall, precision) in enumerate(points):
        if interpolated:
            precision = max(p for _, p in points[k:])
        area, last = area + (recall - last) * precision, recall
    return 100 * area


@pytest.mark.parametrize("ties", [False, True])
def test_both_maps_against_literal_and_sklearn(ties):
    rng = np.random.default_rng(0)
    y = rng.choice([-1, 1], (60, 6), p=[0.7, 0.3])
    logits = y + 2 * rng.standard_normal(y.shape)
    logits = np.round(logits).astype(np.float32) if ties else logits.astype(np.float32)
    result = common.multilabel_metrics(logits, y)
    for c in range(6):
        expected = 100 * average_precision_score(y[:, c] == 1, logits[:, c])
        assert result["ap"][c] == pytest.approx(expected)
        literal = literal_average_precision(logits[:, c], y[:, c] == 1, False)
        assert result["ap"][c] == pytest.approx(literal)
    interpolated = [literal_average_precision(logits[:, c], y[:, c] == 1, True) for c in range(6)]
    assert result["mAP_interp"] == pytest.approx(np.mean(interpolated))
    assert result["mAP_interp"] > result["mAP"] == pytest.approx(result["ap"].mean())


@pytest.mark.parametrize("suffix", ["", "_top3"])
def test_precision_recall_f1_against_loops(suffix):
    rng = np.random.default_rng(1)
    y = rng.choice([-1, 1], (40, 5), p=[0.7, 0.3])
    y[:, 4] = -1  # no positive: left out of the means over classes
    logits = y + 2 * rng.standard_normal(y.shape)
    result = common.multilabel_metrics(logits, y)
    right, said, there = [0] * 5, [0] * 5, [0] * 5
    for n in range(40):
        top = sorted(range(5), key=lambda c: -logits[n, c])[:3]
        for c in range(5):
            guess = c in top if suffix else logits[n, c] >= 0
            right[c] += guess and y[n, c] == 1
            said[c] += guess
            there[c] += y[n, c] == 1
    expected = {
        "OP": sum(right) / sum(said),
        "OR": sum(right) / sum(there),
        "CP": np.mean([right[c] / max(said[c], 1) for c in range(4)]),
        "CR": np.mean([right[c] / there[c] for c in range(4)]),
    }
    for k in "OC":
        p, r = expected[k + "P"], expected[k + "R"]
        expected[k + "F1"] = 2 * p * r / (p + r)
    for name, value in expected.items():
        assert result[name + suffix] == pytest.approx(100 * value)
    assert result["empty_classes"] == 1 and math.isnan(result["ap"][4])


def test_metrics_refuse_unknown_labels_and_non_finite_logits():
    y = np.array([[1, -1], [-1, 1]])
    for logits, labels in ((y * 1.0, y * 0), (y[:1] * 1.0, y)):
        with pytest.raises(ValueError, match="do not fit"):
            common.multilabel_metrics(logits, labels)
    for value in (np.nan, np.inf):
        with pytest.raises(common.InputError, match="not finite"):
            common.multilabel_metrics(y * value, y)


def test_metrics_of_perfect_and_of_empty_predictions():
    y = full_labels()
    assert common.multilabel_metrics(y.astype(float), y)["mAP"] == pytest.approx(100)
    nothing = common.multilabel_metrics(np.full(y.shape, -1.0), y)
    assert nothing["OF1"] == nothing["CF1"] == nothing["OP"] == 0


def test_pseudo_quality_counts_unknown_entries_only():
    y = torch.tensor([[1, 0, 0, -1], [0, 0, 0, 0]])
    truth = torch.tensor([[1, 1, -1, -1], [1, 1, -1, -1]])
    pseudo = torch.tensor([[1, 1, 1, -1], [0, 1, 0, 0]])
    quality = common.pseudo_quality({"p": common.pseudo_counts(pseudo, y, truth)})
    assert quality == {"p_per_image": 1.5, "p_precision": 2 / 3, "p_recall": 2 / 3}
    truth[0, 2] = 0  # nobody knows: neither right nor wrong
    quality = common.pseudo_quality({"p": common.pseudo_counts(pseudo, y, truth)})
    assert quality == {"p_per_image": 1.5, "p_precision": 1, "p_recall": 2 / 3}


# -------------------------------------------------------------------------------------------- runs


def test_checkpoint_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "last.pt"
    common.save_checkpoint(path, {"epoch": 1})

    def broken(state, file):
        file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", broken)
    with pytest.raises(OSError, match="disk full"):
        common.save_checkpoint(path, {"epoch": 2})
    assert torch.load(path, weights_only=True) == {"epoch": 1}
