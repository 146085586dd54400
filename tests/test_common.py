# SPDX-License-Identifier: MIT
"""Labels, data sets on disk, loading and metrics."""

import gc
import hashlib
import http.server
import io
import json
import math
import os
import threading
import zipfile
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import average_precision_score
from timm.layers import BatchNormAct2d
from torch import nn
from torchvision.transforms import v2

import common
from common import InputError
from tests import toy

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
    classes, (images, y), _ = common.load_data("coco", str(coco))
    assert classes == ["person", "toothbrush"] and y.dtype == np.int8
    assert y.tolist() == [[1, 1], [-1, -1], [1, -1]]
    assert [i[-5] for i in images] == ["9", "8", "7"]
    assert len(common.load_data("coco", str(coco), limit=2)[1][1]) == 2


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
    _, train, _ = common.load_data("coco", str(coco))
    truncate(image)
    data = common.ImageDataset(*train, common.make_transform(32))
    loader = common.make_loader(data, Namespace(batch_size=3, workers=1))
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
    classes, (_, y), _ = common.load_data("voc2007", str(voc))
    assert len(classes) == 20 and classes == sorted(classes)
    assert [classes[c] for c in np.flatnonzero(y[0] == 1)] == ["chair"]
    assert (y[0] == -1).sum() == 19


def test_voc_with_broken_files_names_them(voc):
    base = voc / "VOCdevkit" / "VOC2007"
    path = base / "Annotations" / "000005.xml"
    text = path.read_text()
    for broken, named in ((text[:30], "000005.xml"), (text.replace("chair", "unicorn"), "unicorn")):
        path.write_text(broken)
        with pytest.raises(InputError, match=named):
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
    splits = common.load_data("voc2012", str(voc))[1:]
    assert [Path(images[0]).stem for images, _ in splits] == ["000005", "000001"]


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
    classes, (_, y), (_, y_test) = common.load_data("folder", str(folder))
    assert classes == ["cat", "hot dog", "Dürer"]
    assert y.tolist() == [[1, -1, 0], [1, 0, 1]] and y_test.tolist() == [[-1, 1, -1]]


@pytest.mark.parametrize(
    ("file", "text", "word"),
    [
        ("train.csv", b"my images/d.jpg,unicorn\n", "^train.csv line 1: unicorn is no class"),
        ("train.csv", b"my images/d.jpg,cat;-cat\n", "^train.csv line 1: -cat is .*both signs$"),
        ("train.csv", b"\nd.jpg,cat\nd.jpg,cat\n", "d.jpg is twice .*csv line 2, train.csv line 3"),
        ("train.csv", b"my images/d.jpg\n", "^train.csv line 1 "),
        ("train.csv", b"a.jpg,cat,hot dog\n", "^train.csv line 1 "),
        ("train.csv", b",\n , \n\na.jpg,cat,\n", "^train.csv line 4 "),
        ("train.csv", b'a.jpg,"' + 140_000 * b"x\n", "^train.csv cannot be read.* quotes"),
        ("train.csv", b"nowhere.jpg,cat\n", "nowhere.jpg"),
        ("train.csv", b"\xff\xfe,cat\n", "train.csv.*CSV UTF-8"),
        ("train.csv", "D\u00fcrer.jpg,cat\n".encode("cp1252"), "train.csv.*CSV UTF-8"),
        ("train.csv", b"", "list of train names no image"),
        ("test.csv", b",\n", "list of test names no image"),
        ("test.csv", None, "test.csv is not there"),
        ("classes.txt", b"cat\ndog\ncat\n", "^classes.txt: class cat is twice there: 0, 2$"),
        ("classes.txt", b"\xff\n", "classes.txt.*CSV UTF-8"),
        ("classes.txt", None, "classes.txt is not there"),
    ],
)
def test_folder_with_mistakes_names_file_and_line(folder, file, text, word):
    (folder / file).unlink() if text is None else (folder / file).write_bytes(text)
    with pytest.raises(InputError, match=word) as error:
        common.load_data("folder", str(folder))
    assert "\n" not in str(error.value)


# --------------------------------------------------------------------------------------- downloads


@pytest.fixture
def server(coco, tmp_path_factory, monkeypatch):
    """COCO's host on this machine. `flaws` lists what goes wrong with the next answers."""
    flaws, files, asked = [], {}, []
    for url in common.COCO:
        address = url.removeprefix("http://images.cocodataset.org/")
        name, content = Path(address).stem, io.BytesIO()
        with zipfile.ZipFile(content, "w") as archive:
            for path in sorted(coco.rglob("*")):
                inside = "annotations" if "trainval" in name else name
                if path.is_file() and path.parent.name == inside:
                    archive.write(path, path.relative_to(coco))
        files[f"/{address}"] = content.getvalue()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.send_response(200)
            self.end_headers()

        def do_GET(self):
            body, flaw = files[self.path], flaws.pop(0) if flaws else ""
            asked.append(self.path)
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            sent = body[: len(body) // 2] if flaw == "breaks" else body
            self.wfile.write(bytes(len(sent)) if flaw == "wrong" else sent)

        def log_message(self, *_):
            pass

    host = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=host.serve_forever, daemon=True).start()
    base = f"http://127.0.0.1:{host.server_port}"
    sums = {base + address: hashlib.md5(body).hexdigest() for address, body in files.items()}
    monkeypatch.setattr(common, "COCO", sums)
    root = tmp_path_factory.mktemp("new")
    yield SimpleNamespace(flaws=flaws, asked=asked, root=root)
    host.shutdown()
    host.server_close()


def test_a_download_that_breaks_is_named_and_goes_on_when_repeated(server):
    root = str(server.root / "coco")
    for flaw in ("breaks", "wrong"):
        server.flaws += [flaw] * 2
        with pytest.raises(InputError, match="--download coco failed; try again"):
            common.load_data("coco", root, fetch=True)
        server.flaws.clear()
    classes, (_, y), _ = common.load_data("coco", root, fetch=True)
    assert classes == ["person", "toothbrush"] and len(y) == 3
    number = len(server.asked)
    common.load_data("coco", root, fetch=True)  # nothing is fetched twice
    assert len(server.asked) == number
    kept = sorted(path.name for path in server.root.rglob("*") if path.suffix in (".zip", ".done"))
    assert kept == sorted(Path(url).name for url in common.COCO)


@pytest.mark.parametrize("name", ["folder", "vg200", "nuswide", "cub"])
def test_what_has_no_known_address_cannot_be_downloaded(name, tmp_path):
    with pytest.raises(InputError, match=f"--download cannot fetch {name}$"):
        common.load_data(name, str(tmp_path), fetch=True)


@pytest.mark.parametrize("label", ["chair", "dog"])  # dog: of a difficult object
def test_a_label_that_is_no_class_names_the_file(label, voc):
    path = voc / "VOCdevkit" / "VOC2007" / "Annotations" / "000005.xml"
    path.write_text(path.read_text().replace(label, "unicorn"))
    with pytest.raises(InputError, match="000005.xml shows unicorn, which is no class of VOC$"):
        common.load_data("voc2007", str(voc))


def test_voc_comes_through_torchvision(voc, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(common, "VOCDetection", lambda *a, **k: asked.append((a[1:], k)))
    assert len(common.load_data("voc2007", str(voc), fetch=True)[1][1]) == 1
    assert asked == [(("2007", part), {"download": True}) for part in ("trainval", "test")]


def test_toy_world_is_the_same_every_time_and_follows_its_contexts():
    scenes = getattr(toy.scenes, "__wrapped__", toy.scenes)
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
    x = common.make_transform(32, (512, 256))(common.open_image(str(path)))
    assert x.shape == (3, 32, 32) and x.dtype == torch.uint8


def test_16_bits_are_scaled_and_not_clipped(tmp_path):
    grey = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    Image.fromarray(grey).save(tmp_path / "x.png")
    assert (np.asarray(common.open_image(tmp_path / "x.png"))[..., 0] == grey >> 8).all()


@pytest.mark.parametrize("kind", ["png", "tiff"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_photographs_load_upright(orientation, kind, tmp_path):
    image = Image.fromarray(np.random.default_rng(0).integers(256, size=(4, 6, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x0112] = orientation
    turned = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # orientation: what the camera did, inverse
    stored = image.transpose(turned[orientation]) if orientation > 1 else image
    stored.save(tmp_path / f"x.{kind}", exif=exif)
    assert np.array_equal(common.open_image(tmp_path / f"x.{kind}"), image)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_is_laid_on_white(mode, tmp_path):
    image = Image.new("RGBA", (4, 4), (200, 0, 0, 0))
    if mode == "P":
        image = Image.new("P", (4, 4), 0)
        image.info["transparency"] = 0
    image = image.convert(mode) if mode == "LA" else image
    image.save(tmp_path / "x.png")
    assert (np.asarray(common.open_image(tmp_path / "x.png")) == 255).all()


def test_batches_are_shuffled_by_the_epoch_and_leave_out_a_smaller_last_one():
    images, y, _ = toy.scenes(20, 3)
    data = common.ImageDataset(images, y, common.make_transform(64))
    args = Namespace(workers=0, batch_size=8)

    def batches(epoch):
        loader = common.make_loader(data, args, train=True)
        loader.sampler.set_epoch(epoch)
        return [index for *_, index in loader]

    first = batches(1)
    torch.rand(5)  # the generator of everything else has no part in it
    same = batches(1)
    again = batches(2)
    assert [len(index) for index in first] == [8, 8] and len({*torch.cat(first).tolist()}) == 16
    assert torch.equal(torch.cat(first), torch.cat(same))
    assert not torch.equal(torch.cat(first), torch.cat(again))
    ordered = [index for *_, index in common.make_loader(data, args)]
    assert torch.cat(ordered).tolist() == list(range(20))
    args.batch_size = 64  # a single smaller batch stays
    assert [len(index) for *_, index in common.make_loader(data, args, train=True)] == [20]


def test_random_views_hang_on_epoch_and_image_alone():
    images, y, _ = toy.scenes(12, 3)
    weak = common.make_transform(32, (448, 320))
    strong = v2.Compose([v2.RandAugment(2, 9), weak, v2.RandomErasing(0.5)])
    data = common.ImageDataset(images, y, weak, strong)

    def views(loader, epoch, sampled):
        common.EPOCH.fill_(epoch)
        loader.sampler.set_epoch(sampled)
        found = {}
        for first, second, _, index in loader:
            for i, *pair in zip(index.tolist(), first, second, strict=True):
                found[i] = torch.stack(pair).clone()
        return torch.stack([found[i] for i in range(12)])

    here = common.make_loader(data, Namespace(workers=0, batch_size=4), train=True)
    others = common.make_loader(data, Namespace(workers=2, batch_size=3), train=True)
    assert others.persistent_workers
    before = common.EPOCH.item()
    first = views(here, 1, 1)
    second = views(here, 2, 1)
    assert torch.equal(views(others, 1, 5), first)
    assert torch.equal(views(others, 2, 5), second)  # by the same workers, which live on
    assert torch.equal(views(here, 1, 7), first)
    common.EPOCH.fill_(before)
    changed = (first != second).flatten(2).any(2)  # (12, 2)
    assert changed.all()
    picture = common.ImageDataset(images[:1].repeat(2, 0), y[:2], weak)
    assert not torch.equal(picture[0][0], picture[1][0])  # another image, another view


def test_outputs_keep_the_order_of_the_images():
    images, y, _ = toy.scenes(20, 3)
    data = common.ImageDataset(images, y, common.make_transform(64))
    loader = common.make_loader(data, Namespace(workers=0, batch_size=8))
    mean = common.outputs(lambda x: (x.float().mean((1, 2, 3)),), loader, torch.device("cpu"))[0]
    expected = torch.tensor(images).float().mean((1, 2, 3))
    torch.testing.assert_close(mean, expected)


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs Linux's /proc")
def test_outputs_keep_nothing_that_a_worker_sent():
    images, y, _ = toy.scenes(60, 3)
    data = common.ImageDataset(images, y, common.make_transform(8))
    loader = common.make_loader(data, Namespace(workers=1, batch_size=1))
    opened = []

    def forward(x):
        opened.append(len(os.listdir("/proc/self/fd")))
        return x.float().mean((1, 2, 3)), x.float().amax((1, 2, 3))

    mean, most = common.outputs(forward, loader, torch.device("cpu"))
    assert len(mean) == len(most) == len(opened) == 60
    assert max(opened[30:]) <= max(opened[:30]) + 5  # at most a few batches are on their way


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
    result, ap = common.multilabel_metrics(logits, y), common.average_precision(logits, y)
    for c in range(6):
        expected = 100 * average_precision_score(y[:, c] == 1, logits[:, c])
        assert ap[c] == pytest.approx(expected)
        literal = literal_average_precision(logits[:, c], y[:, c] == 1, False)
        assert ap[c] == pytest.approx(literal)
    interpolated = [literal_average_precision(logits[:, c], y[:, c] == 1, True) for c in range(6)]
    assert result["mAP_interp"] == pytest.approx(np.mean(interpolated))
    assert result["mAP_interp"] > result["mAP"] == pytest.approx(ap.mean())


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
            guess = logits[n, c] >= 0 and (not suffix or c in top)
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
    assert result["empty_classes"] == 1 and math.isnan(common.average_precision(logits, y)[4])


def test_unknown_test_labels_count_nowhere():
    rng = np.random.default_rng(2)
    y = rng.choice([-1, 1], (40, 5))
    logits = y + 2 * rng.standard_normal(y.shape)
    some = np.where(rng.random(y.shape) < 0.3, 0, y)
    result = common.multilabel_metrics(logits, some)
    for c in range(5):
        known = some[:, c] != 0
        expected = 100 * average_precision_score(y[known, c] == 1, logits[known, c])
        assert common.average_precision(logits, some)[c] == pytest.approx(expected)
    said, right = (logits >= 0) & (some != 0), (logits >= 0) & (some == 1)
    assert result["OP"] == pytest.approx(100 * right.sum() / said.sum())
    assert result["OR"] == pytest.approx(100 * right.sum() / (some == 1).sum())
    wild = np.where(some == 0, 1e3 * rng.standard_normal(y.shape), logits)
    others = common.multilabel_metrics(wild, some)
    assert others == pytest.approx(result)


def test_metrics_refuse_non_finite_logits():
    y = np.array([[1, -1], [-1, 1]])
    for value in (np.nan, np.inf):
        with pytest.raises(common.InputError, match="not finite"):
            common.multilabel_metrics(y * value, y)


def test_metrics_of_perfect_and_of_empty_predictions():
    y = full_labels()
    assert common.multilabel_metrics(y.astype(float), y)["mAP"] == pytest.approx(100)
    nothing = common.multilabel_metrics(np.full(y.shape, -1.0), y)
    assert nothing["OF1"] == nothing["CF1"] == nothing["OP"] == 0


def test_log_entries_are_means_of_losses_and_quality_of_unknown_entries():
    y = torch.tensor([[1, 0, 0, -1], [0, 0, 0, 0]])
    truth = torch.tensor([[1, 1, -1, -1], [1, 1, -1, -1]])
    pseudo = torch.tensor([[1, 1, 1, -1], [0, 1, 0, 0]])
    totals = {}
    for value in (1.0, 2.0):
        counts = common.pseudo_counts(pseudo, y, truth)
        common.add_up(totals, loss=torch.tensor(value), pseudo=counts)
    entry = common.epoch_entry(totals, 2)
    expected = dict(per_image=1.5, precision=2 / 3, recall=2 / 3)
    assert entry == dict(loss=1.5) | {f"pseudo_{k}": v for k, v in expected.items()}
    truth[0, 2] = 0  # nobody knows: neither right nor wrong
    entry = common.epoch_entry(dict(pseudo=common.pseudo_counts(pseudo, y, truth)), 2)
    assert entry["pseudo_precision"] == 1 and entry["pseudo_per_image"] == 1.5


# -------------------------------------------------------------------------------------------- runs


def parsed(*flags):
    parser = common.arguments("doc", known="images", mask_seed=0, batch_size=2)
    return common.parse(parser, dict(real={}), "sst", flags)[0]


WRONG = dict(known="0 -0.1 1.01 nan", size="0 -1", lr="nan inf 0 -1", workers="-1", epochs="0")
WRONG |= {"seed": f"-1 {2**32}", "mask-seed": f"-1 {2**32}", "limit": "0", "batch-size": "0"}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_argument_is_named_with_its_rule(name):
    for value in WRONG[name].split():
        with pytest.raises(InputError, match=f"argument --{name}: {value} must be") as error:
            parsed(f"--{name}={value}")
        assert "\n" not in str(error.value)
    with pytest.raises(InputError, match=f"argument --{name}: invalid (int|float) value: 'many'"):
        parsed(f"--{name}=many")


def test_the_ends_of_what_an_argument_may_be_are_right():
    args = parsed("--known=1", "--size=1", f"--seed={2**32 - 1}", "--mask-seed=0", "--workers=0")
    assert (args.known, args.size, args.workers) == (1, 1, 0)
    assert (args.seed, args.mask_seed) == (2**32 - 1, 0)
    args = parsed("--known=0.01", "--lr=1e-9", "--limit=1", "--batch-size=1", "--epochs=1")
    assert (args.known, args.lr) == (0.01, 1e-9)
    assert (args.limit, args.batch_size, args.epochs) == (1, 1, 1)


def a_run(out, net=None, **more):
    net = net or nn.Linear(1, 1)
    args = Namespace(**dict(out=out, resume=None, dry_run=False, seed=3, batch_size=2) | more)
    about = dict(method="sst", data="x", mask="", classes=["cat"])
    optimizer = torch.optim.Adam(net.parameters())
    return common.Run(args, about, None, model=net, optimizer=optimizer)


def a_task(images, y, classes):
    return SimpleNamespace(test_images=images, test_y=y, classes=classes)


def test_a_run_takes_its_folder_alone_and_leaves_none_that_is_empty(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run = a_run("a/b")
    assert Path("a/b").is_dir()
    with pytest.raises(InputError, match="--out a/b is there; add --resume auto"):
        a_run("a/b")
    assert Path("a/b").is_dir()  # it is still that of the first
    del run
    gc.collect()
    assert not Path("a/b").exists()
    run = a_run("a/b")
    run.add(dict(epoch=1, mAP=math.nan, loss=1.0))
    del run
    gc.collect()
    assert json.loads(Path("a/b/log.jsonl").read_text().splitlines()[1])["mAP"] is None
    again = a_run("a/b", resume="auto")
    assert again.out == Path("a/b")
    with pytest.raises(InputError, match="--out a/b is there"):
        a_run("a/b", resume="a/last.pt")  # of another folder
    runs = [a_run(None), a_run(None)]
    assert [run.out for run in runs] == [Path("runs/sst-x-1"), Path("runs/sst-x-2")]
    a_run("dry", dry_run=True).add(dict(epoch=1, mAP=1.0))
    assert not Path("dry").exists()


def test_what_no_image_can_tell_is_printed_as_none(tmp_path, capsys):
    values = (None, math.nan, 0.0, 12.346)
    assert [common.percent(x) for x in values] == ["none", "none", "0.00", "12.35"]
    run = a_run(str(tmp_path / "run"))
    y = -np.ones((3, 1), int)
    metrics = common.multilabel_metrics(np.zeros((3, 1)), y)
    assert math.isnan(metrics["mAP"]) and math.isnan(metrics["mAP_interp"])
    assert metrics["empty_classes"] == 1
    run.entry = dict(epoch=1)
    run.add(run.entry | metrics)
    capsys.readouterr()
    run.finish(a_task(np.zeros((3, 8, 8, 3), np.uint8), y, ["cat"]), torch.zeros(3, 1))
    assert "| mAP | none | none |" in capsys.readouterr().out
    assert (tmp_path / "run" / "samples.png").exists()


def test_what_is_random_in_a_network_is_repeated_with_its_epoch(tmp_path):
    """As of the stochastic depth of a trunk, wherever the order and the views come from."""
    net = nn.Sequential(nn.Linear(1, 1), nn.Dropout(0.5))
    run = a_run(str(tmp_path / "run"), net)
    loader = common.make_loader(range(8), Namespace(workers=0, batch_size=2), train=True)
    found = []
    for epoch in (1, 2, 1):
        run.begin(epoch, loader)
        found.append(net(torch.ones(64, 1)) == 0)
    assert torch.equal(found[0], found[2]) and not torch.equal(found[0], found[1])


@pytest.mark.parametrize(("sizes", "steps", "expected"), [((8,), 0, 40), ((2, 6), 20, 160)])
def test_images_of_an_epoch_are_those_of_its_steps(sizes, steps, expected, tmp_path):
    run = a_run(str(tmp_path / "run"), nn.Linear(1, 1))
    args = Namespace(workers=0, batch_size=8)
    run.begin(1, *(common.make_loader(range(40), args, True, size) for size in sizes), steps=steps)
    assert run.images == expected


def test_norms_of_several_gpus_keep_the_activation_that_they_hold(monkeypatch):
    net = nn.Sequential(BatchNormAct2d(3), nn.BatchNorm2d(3)).eval()
    monkeypatch.setattr(common, "PROCESSES", 2)
    monkeypatch.setattr(nn.parallel, "DistributedDataParallel", lambda net: net)
    monkeypatch.setattr(net, "parameters", lambda: iter([SimpleNamespace(is_cuda=True)]))
    x = torch.randn(4, 3, 2, 2)
    expected = net(x)
    converted = common.parallel(net, compiled=False)
    assert all(isinstance(norm, nn.SyncBatchNorm) for norm in converted)
    torch.testing.assert_close(converted(x), expected)
