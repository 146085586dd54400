# SPDX-License-Identifier: MIT
"""Labels and their hiding, metrics and tables, images and views, pictures and predictions."""

import csv
import hashlib
import os
import re
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import average_precision_score
from torchvision.transforms import v2

import common
from tests.conftest import random_images

CLASSES = ["cat", "dog", "owl"]
FINE = np.array([[1, -1, 1], [-1, 1, -1]], np.int8)  # each class has both signs
WEAK_AND_STRONG = [(), (2, 1.0, 0.3)]


def signs(*shape, absent=0.5):
    """Labels 1 and -1, scores that tell something of them, and a generator for more."""
    rng = np.random.default_rng(0)
    y = np.where(rng.random(shape) < absent, -1, 1).astype(np.int8)
    logits = (y + 2 * rng.standard_normal(shape)).astype(np.float32)
    return y, logits, rng


Y = signs(50, 8)[0]


def test_need_ends_with_one_line():
    common.need(True, "nothing")
    with pytest.raises(SystemExit, match="^error: a file of two lines$"):
        common.need(False, "a file\n  of two\tlines")


def test_hidden_entries_are_those_of_the_benchmark():
    hidden = common.hide_entries(Y, 0.3, seed=3)
    keep = np.random.RandomState(3).random_sample(Y.shape) < 0.3
    assert hidden.dtype == np.int8
    assert (hidden == Y * keep).all()


def test_masks_of_voc2007_are_those_of_the_authors_of_sst():
    y = np.ones((5011, 20), np.int8)
    known = [common.hide_entries(y, known, seed=0).mean() for known in (0.1, 0.5)]
    assert known == pytest.approx([0.100858, 0.500529], abs=5e-7)


def test_hidden_images_are_those_of_the_benchmark():
    hidden = common.hide_images(Y, 0.23, seed=1)
    kept = np.random.RandomState(1).permutation(50)[:11]
    assert hidden.dtype == np.int8
    assert (hidden[kept] == Y[kept]).all()
    assert not np.delete(hidden, kept, axis=0).any()


@pytest.mark.parametrize("hide", [common.hide_entries, common.hide_images])
def test_what_is_known_stays_known_at_a_higher_proportion(hide):
    masks = [hide(Y, k / 10, seed=0) != 0 for k in range(1, 11)]
    assert all((a <= b).all() for a, b in zip(masks, masks[1:], strict=False))
    assert masks[-1].all()


@pytest.mark.parametrize("hide", [common.hide_entries, common.hide_images])
def test_hiding_changes_neither_the_labels_nor_the_global_generator(hide):
    before = Y.copy()
    state = np.random.get_state()[1].copy()
    hide(Y, 0.5, seed=0)
    assert (Y == before).all()
    assert (np.random.get_state()[1] == state).all()


def test_class_names_become_words():
    names = ["tvmonitor", "diningtable", "pottedplant", "traffic_light", "Hot dog "]
    texts = ["tv monitor", "dining table", "potted plant", "traffic light", "hot dog"]
    assert [common.class_text(name) for name in names] == texts


@pytest.mark.parametrize(
    ("y", "test_y", "words"),
    [
        (np.where([0, 1, 0], -1, FINE), FINE, "without a known positive.* dog$"),
        (np.where([0, 0, 1], 1, FINE), FINE, "never known absent.* owl$"),
        (FINE, np.where([1, 0, 0], 1, FINE), "test labels are all alike.* cat$"),
    ],
)
def test_a_class_that_is_not_learned_or_not_measured_is_a_warning(y, test_y, words, caplog):
    common.check_labels(CLASSES, y, test_y)
    (message,) = caplog.messages
    assert re.search(words, message) and "1" in message


@pytest.mark.parametrize(("y", "words"), [(0 * FINE, "raise --known"), (abs(FINE), "add -labels")])
def test_labels_without_a_known_or_without_an_absent_one_are_refused(y, words):
    with pytest.raises(SystemExit, match=words):
        common.check_labels(CLASSES, y, FINE)


def test_the_hash_is_that_of_all_labels_in_their_order(capsys):
    test_y = signs(9, 3)[0]
    some = common.hide_entries(signs(40, 3)[0], 0.5, seed=0)
    expected = hashlib.sha256(some.tobytes() + test_y.tobytes()).hexdigest()[:8]
    assert common.check_labels(CLASSES, some, test_y) == expected
    assert f"of 40 x {len(CLASSES)} are known, hash {expected}" in capsys.readouterr().out
    for other in ((-some, test_y), (some[::-1], test_y), (some, test_y[::-1])):
        assert common.check_labels(CLASSES, *other) != expected


def literal_ap(scores, truth):
    """Mean over the positives of the precision at their score, and of the best at one as low."""
    precision = {t: truth[scores >= t].mean() for t in scores}
    at_score = [precision[t] for t in scores[truth]]
    best = [max(precision[low] for low in scores if low <= t) for t in scores[truth]]
    return 100 * np.mean(at_score), 100 * np.mean(best)


@pytest.mark.parametrize("ties", [False, True])
def test_ap_is_that_of_sklearn_and_interpolated_that_of_a_loop(ties):
    y, logits, _ = signs(60, 6, absent=0.7)
    logits = np.round(logits) if ties else logits
    expected = [100 * average_precision_score(y[:, c] == 1, logits[:, c]) for c in range(6)]
    np.testing.assert_allclose(common.average_precision(logits, y), expected)
    expected = [literal_ap(logits[:, c], y[:, c] == 1)[1] for c in range(6)]
    np.testing.assert_allclose(common.average_precision(logits, y, interpolated=True), expected)


def test_both_maps_are_means_over_the_classes_that_have_an_ap():
    y, logits, _ = signs(60, 3, absent=0.7)
    y[:, 1] = -1
    assert np.isnan(common.average_precision(logits, y)).tolist() == [False, True, False]
    result = common.multilabel_metrics(logits, y, CLASSES)
    assert result["classes"] == "2 of 3"
    cat, owl = (literal_ap(logits[:, c], y[:, c] == 1) for c in (0, 2))
    assert result["AP"] == pytest.approx(dict(cat=cat[0], owl=owl[0]))
    expected = np.mean([cat, owl], axis=0)
    assert [result["mAP"], result["mAP_interp"]] == pytest.approx(expected)


def test_where_nothing_is_measured_or_said_there_is_no_map_and_rates_are_zero():
    result = common.multilabel_metrics(np.full((2, 3), -1.0), -abs(FINE), CLASSES)
    assert result["mAP"] is None and result["mAP_interp"] is None
    assert result["classes"] == "0 of 3"
    assert result["OP"] == result["OF1"] == result["CP"] == result["CF1"] == 0


@pytest.mark.parametrize("suffix", ["", "_top3"])
def test_precision_recall_and_f1_are_those_of_loops(suffix):
    y, logits, rng = signs(40, 6, absent=0.7)
    y[:, 4] = -1  # no positive: left out of the means over classes
    y[rng.random(y.shape) < 0.2] = 0
    right, said, there = np.zeros((3, 6))
    for n in range(40):
        known = [c for c in range(6) if y[n, c]]
        top = sorted(known, key=lambda c: -logits[n, c])[:3]
        for c in known:
            guess = logits[n, c] >= 0 and (suffix == "" or c in top)
            said[c] += guess
            right[c] += guess and y[n, c] == 1
            there[c] += y[n, c] == 1
    shown = [0, 1, 2, 3, 5]
    overall = right.sum() / said.sum(), right.sum() / there.sum()
    classwise = (right / said)[shown].mean(), (right[shown] / there[shown]).mean()
    result = common.multilabel_metrics(logits, y, list("abcdef"))
    for letter, (p, r) in dict(O=overall, C=classwise).items():
        found = [result[letter + name + suffix] for name in ("P", "R", "F1")]
        assert found == pytest.approx([100 * p, 100 * r, 100 * 2 * p * r / (p + r)])


def test_scores_of_unknown_labels_count_nowhere():
    y, logits, rng = signs(40, 5)
    y[rng.random(y.shape) < 0.3] = 0
    wild = np.where(y == 0, 1e3 * rng.standard_normal(y.shape), logits)
    before = common.multilabel_metrics(logits, y, "abcde")
    assert common.multilabel_metrics(wild, y, "abcde") == before


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_score_that_is_not_finite_is_refused(value):
    with pytest.raises(SystemExit, match="not finite.*lower --lr"):
        common.multilabel_metrics(value * FINE, FINE, CLASSES)


def test_guesses_are_judged_where_a_label_was_hidden():
    y = np.array([[1, 0, 0, -1], [0, 0, 0, 0]])
    truth = np.array([[1, 1, -1, -1], [1, 1, -1, 0]])
    pseudo = np.array([[1, 1, 1, -1], [0, 1, 0, 1]])  # of the last one nobody knows the truth
    expected = dict(pseudo_per_image=4 / 2, pseudo_precision=2 / 3, pseudo_recall=2 / 3)
    assert common.pseudo_metrics(pseudo, y, truth) == pytest.approx(expected)
    expected = dict(pseudo_per_image=0, pseudo_precision=None, pseudo_recall=None)
    assert common.pseudo_metrics(FINE, FINE, FINE) == expected


def test_an_entry_is_described_by_what_it_holds():
    entry = dict(lr=0.1, mAP=12.3456, epoch=3, classes="2 of 3", pseudo_precision=None)
    assert common.describe(entry) == "epoch 3  mAP 12.35  classes 2 of 3"


def test_the_table_shows_the_last_and_the_best_epoch_and_what_they_mean():
    entries = [
        dict(epoch=k, loss=1.0, mAP=value, mAP_interp=None, classes="2 of 3", OF1=value / 2)
        for k, value in enumerate((40.0, 60.25, 50.0))
    ]
    lines = common.metrics_table(entries).splitlines()
    assert "last epoch | best on test" in lines[0]
    assert lines[2:4] == ["| mAP | 50.00 | 60.25 |", "| OF1 | 25.00 | 30.12 |"]
    assert lines[4].startswith("mAP: the mean AP of 2 of 3 classes.")
    assert "p >= 0.5" in lines[5]


def opened(image, path, **options):
    """The pixels of an image that was saved to a path and opened from it."""
    image.save(path, **options)
    found = common.open_image(path, side=1)
    assert found.mode == "RGB"
    return np.asarray(found).astype(int)


# an EXIF block of two entries: the camera lay on its side; a resolution that is a text
SIDE = b"\x12\1\3\0\1\0\0\0\6\0\0\0"
DAMAGED = b"Exif\0\0II*\0\x08\0\0\0\2\0" + SIDE + b"\x1a\1\2\0\4\0\0\0abc\0" + bytes(4)


def test_photographs_are_upright_even_if_their_exif_is_damaged(tmp_path):
    stored = Image.new("RGB", (6, 4), "red")
    stored.paste("blue", (3, 0, 6, 4))  # at the right of the file, below in the photograph
    pixels = opened(stored, tmp_path / "x.png", exif=DAMAGED)
    assert pixels.shape == (6, 4, 3)
    assert (pixels[:3] == (255, 0, 0)).all() and (pixels[3:] == (0, 0, 255)).all()


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_is_laid_on_white(mode, tmp_path):
    options = dict(transparency=0) if mode == "P" else {}
    assert (opened(Image.new(mode, (4, 4), 0), tmp_path / "x.png", **options) == 255).all()


@pytest.mark.parametrize(("mode", "name"), [("P", "x.png"), ("CMYK", "x.jpg")])
def test_palettes_and_printers_colours_are_colours(mode, name, tmp_path):
    pixels = opened(Image.new("RGB", (8, 8), "red").convert(mode), tmp_path / name)
    assert abs(pixels - (255, 0, 0)).max() <= 2


@pytest.mark.parametrize("bits", [8, 12, 16])
def test_16_bits_are_scaled_by_those_that_the_file_uses(bits, tmp_path):
    values = np.linspace(0, 2**bits - 1, 256).astype(np.uint16).reshape(16, 16)
    pixels = opened(Image.fromarray(values), tmp_path / "x.png")
    assert (pixels == values[..., None] >> (bits - 8)).all()


@pytest.mark.parametrize("kept", [0, 999])
def test_a_file_that_is_cut_is_named(kept, tmp_path):
    path = tmp_path / "x.png"
    Image.effect_noise((60, 60), 50).save(path)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(OSError, match=r"^image .*x\.png: .*JPEG or PNG"):
        common.open_image(path, side=1)


@pytest.mark.parametrize(("side", "width"), [(100, 160), (101, 320), (999, 640)])
def test_a_jpeg_is_decoded_smaller_but_never_under_the_side(side, width, tmp_path):
    Image.new("RGB", (640, 400)).save(tmp_path / "x.jpg")
    assert common.open_image(tmp_path / "x.jpg", side).width == width


def test_images_to_predict_are_files_and_what_is_in_and_below_folders(tmp_path):
    (tmp_path / "in" / "deeper").mkdir(parents=True)
    for name in ("b.png", "in/a.png", "in/deeper/c.png"):
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    (tmp_path / "in" / ".DS_Store").write_text("of a Mac")
    found = common.find_images([f"{tmp_path}/b.png", f"{tmp_path}/in"])
    names = [os.path.relpath(path, tmp_path) for path in found]
    assert names == ["b.png", "in/a.png", "in/deeper/c.png"]


def test_nothing_to_predict_is_refused_and_a_broken_file_is_named(tmp_path):
    with pytest.raises(SystemExit, match=f"there is no file in {tmp_path}"):
        common.find_images([str(tmp_path)])
    (tmp_path / "list.txt").write_text("no image")
    with pytest.raises(OSError, match=r"list\.txt"):
        common.find_images([str(tmp_path)])


def ramp():
    """64 x 64: red grows to the right, green to the bottom, by 4 a pixel."""
    y, x = np.mgrid[:64, :64]
    return Image.fromarray(np.stack((4 * x, 4 * y, 0 * x), 2).astype(np.uint8))


def test_a_plain_view_is_a_resize_that_does_not_keep_the_aspect():
    image = ramp().resize((64, 48))
    view = common.make_view(32)(image)
    expected = v2.functional.pil_to_tensor(image.resize((32, 32), Image.Resampling.BICUBIC))
    assert view.dtype == torch.uint8 and torch.equal(view, expected)


def test_random_views_are_crops_of_the_five_sizes_flipped_or_not():
    view = common.make_view(56, smallest_crop=256)  # an eighth of 448
    views = torch.stack([view(ramp()) for _ in range(80)]).float()
    red, green, _ = views.unbind(1)
    sides = (green.amax((1, 2)) - green.amin((1, 2))) / 4
    assert {*(8 * (sides / 8).round()).tolist()} == {32, 40, 48, 56, 64}
    assert {*(red[:, 0, 0] > red[:, 0, -1]).tolist()} == {False, True}
    assert (green[:, 0, 0] < green[:, -1, 0]).all()  # never upside down


def test_randaugment_comes_after_the_resize(monkeypatch):
    augment = Mock(side_effect=lambda x: x)
    monkeypatch.setattr(v2, "RandAugment", Mock(return_value=augment))
    common.make_view(48, 256, operations=2)(ramp())
    v2.RandAugment.assert_called_once_with(2)
    assert augment.call_args.args[0].size == (48, 48)


@pytest.mark.parametrize("given", [(0,), (64, 600), (64, 0, 2, 1.5), (64, 0, 2, 0.5, 1.5)])
def test_a_view_that_cannot_be_is_refused(given):
    with pytest.raises(SystemExit, match="--size must be above 0, --smallest-crop at most 512, "):
        common.make_view(*given)


def test_a_part_of_a_view_is_erased():
    view = common.make_view(64, erase=1.0, part=0.1)
    erased = (view(Image.new("RGB", (64, 64), "white")) == 0).float().mean().item()
    assert 0.01 < erased < 0.12


def test_an_item_is_a_view_for_each_strength_and_the_index_from_one_opening(tmp_path, monkeypatch):
    Image.new("RGB", (40, 30), "white").save(tmp_path / "x.png")
    data = common.ImageDataset(["away.png", str(tmp_path / "x.png")], 32, 256, WEAK_AND_STRONG)
    monkeypatch.setattr(Image, "open", Mock(wraps=Image.open))
    weak, strong, i = data[1]
    assert Image.open.call_count == 1
    assert len(data) == 2 and i == 1
    assert weak.shape == strong.shape == (3, 32, 32)
    assert weak.dtype == strong.dtype == torch.uint8
    assert weak.min() == 255 and strong.min() == 0  # a part of the strong one is erased


def test_views_are_repeated_under_a_seed():
    data = common.ImageDataset([np.asarray(ramp())], 32, 256, WEAK_AND_STRONG)
    views = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        views.append(torch.stack(data[0][:2]))
    assert torch.equal(views[0], views[1])
    assert not torch.equal(views[0], views[2])


@pytest.mark.parametrize("scale", [(), ([0.5, 0.4, 0.3], [0.3, 0.2, 0.1])])
def test_normalise_is_that_of_torchvision(scale, rng):
    images = random_images(rng, size=8)
    mean, std = scale or ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    expected = v2.functional.normalize(images / 255, mean, std)
    torch.testing.assert_close(common.normalise(images, *scale), expected)


def test_pictures_name_the_likeliest_classes_in_the_colour_of_their_label(tmp_path, monkeypatch):
    text = Mock()
    monkeypatch.setattr(common.ImageDraw.ImageDraw, "text", text)
    images = np.zeros((20, 9, 9, 3), np.uint8)
    logits = torch.tensor([[0.1, 0.9, 0.5]] * 20).logit()
    common.save_pictures(tmp_path, images, np.array([[0, 1, -1]] * 20), logits, CLASSES)
    drawn = [(call.args[1], call.kwargs["stroke_fill"]) for call in text.call_args_list[:3]]
    assert drawn == [("dog 0.90", "green"), ("owl 0.50", "red"), ("cat 0.10", "gray")]
    assert Image.open(tmp_path / "samples.png").size == (6 * 178 + 2, 3 * 178 + 2)


def predict(folder, images, *p):
    """The new table of predictions, of probabilities (images, C)."""
    common.save_predictions(folder, images, torch.tensor(p).logit(), ["cat", "Dürer, A."])
    path = max(folder.glob("predictions-?.csv"))
    with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        return list(csv.reader(file))


def test_predictions_are_a_table_with_four_digits_that_excel_reads(tmp_path):
    assert predict(tmp_path, ["a, b.jpg", "кошка.jpg"], [0.25, 0.75], [0.12346, 0.5]) == [
        ["path", "cat", "Dürer, A."],
        ["a, b.jpg", "0.2500", "0.7500"],
        ["кошка.jpg", "0.1235", "0.5000"],
    ]
    assert (tmp_path / "predictions-1.csv").read_bytes().startswith(b"\xef\xbb\xbf")


def test_predictions_print_what_is_likely_the_likeliest_first(tmp_path, capsys):
    predict(tmp_path, ["a.jpg", "b.jpg"], [0.6, 0.9], [0.1, 0.4])
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == ["a.jpg: Dürer, A. 0.90, cat 0.60", "b.jpg: nothing is likely"]
    assert f"{tmp_path}/predictions-1.csv" in lines[2] and "0.5" in lines[2]


def test_predictions_never_overwrite_others(tmp_path):
    for p in (0.1, 0.2, 0.3):
        assert predict(tmp_path, ["a.jpg"], [p, 0.5])[1][1] == f"{p:.4f}"
    assert [path.name[-5] for path in sorted(tmp_path.iterdir())] == ["1", "2", "3"]


def test_names_that_are_not_utf_8_keep_their_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(common, "print", lambda *words: None, raising=False)
    rows = predict(tmp_path, [os.fsdecode(b"D\xfcrer.jpg")], [0.1, 0.9])
    assert os.fsencode(rows[1][0]) == b"D\xfcrer.jpg"
