# SPDX-License-Identifier: MIT
"""Reading CLIP's towers, which cbsa.py and scinet.py do in the same words: against open_clip's own
features and loops over the positions."""

import inspect
import json

import open_clip
import pytest
import torch
from torch.nn.functional import interpolate, linear, normalize

import cbsa
import scinet
from tests.conftest import random_images

TEXT = dict(context_length=16, vocab_size=512, width=64, heads=1, layers=1)
RESNET = dict(layers=[1, 1, 1, 1], width=8, image_size=64)
VIT = dict(layers=2, width=64, head_width=64, patch_size=16, image_size=64)
TIMM = dict(timm_pool="", timm_proj="linear", image_size=64)
TOWERS = dict(
    resnet=RESNET,
    vit=VIT,
    vit_mean=VIT | dict(pool_type="avg", ls_init_value=0.1),
    convnext=TIMM | dict(timm_model_name="test_convnext"),
    efficientnet=TIMM | dict(timm_model_name="test_efficientnet", timm_pool="avg"),
)
SPEC = dict(embed_dim=24, vision_cfg=VIT, text_cfg=TEXT)
PREPROCESS = dict(mean=[0.1, 0.2, 0.3], std=[0.4, 0.5, 0.6])


def write(folder, vision=VIT, **more):
    """--arch of a folder of open_clip without weights."""
    folder.mkdir(parents=True, exist_ok=True)
    content = dict(model_cfg=SPEC | dict(vision_cfg=vision) | more, preprocess_cfg=PREPROCESS)
    (folder / "open_clip_config.json").write_text(json.dumps(content))
    return f"local-dir:{folder}"


def load(arch, size=0):
    """A CLIP of which no weight, bias or scale is at its start, where many are 0 or 1."""
    clip = cbsa.load_clip(arch, "none", size)[0]
    for p in clip.parameters():
        p.data += 0.05 * torch.randn_like(p)
    return clip


def resnet_loop(visual, x):
    """The value of the attention pool."""
    for step in (visual.stem, visual.layer1, visual.layer2, visual.layer3, visual.layer4):
        x = step(x)
    pool = visual.attnpool
    for i, column in enumerate(x.flatten(2).unbind(-1), start=1):  # 0 is the mean
        yield pool.c_proj(pool.v_proj(column + pool.positional_embedding[i]))


def vit_loop(visual, x):
    """MaskCLIP: the last block with the value in the place of the attention's output."""
    x = visual._embeds(x)
    *before, last = visual.transformer.resblocks
    for block in before:
        x = block(x)
    weight = last.attn.in_proj_weight[-64:]
    bias = last.attn.in_proj_bias[-64:]
    for i in range(1, x.shape[1]):  # 0 is the class token
        value = linear(last.ln_1(x[:, i]), weight, bias)
        y = x[:, i] + last.ls_1(last.attn.out_proj(value))
        y = y + last.ls_2(last.mlp(last.ln_2(y)))
        yield visual.ln_post(y) @ visual.proj


def timm_loop(visual, x):
    """The head, on a map of one position."""
    for column in visual.trunk.forward_features(x).flatten(2).unbind(-1):
        yield visual.head(visual.trunk.forward_head(column[:, :, None, None]))


@torch.no_grad()
@pytest.mark.parametrize("size", [64, 96])
@pytest.mark.parametrize("kind", TOWERS)
def test_features_are_open_clips_and_local_ones_those_of_a_loop(kind, size, tmp_path, rng):
    clip = load(write(tmp_path, TOWERS[kind]), size)
    images = random_images(rng, size, 2)
    f, u = cbsa.clip_features(clip.visual, images)
    mean, std = torch.tensor([*PREPROCESS.values()])[:, :, None, None]
    x = (images / 255 - mean) / std
    torch.testing.assert_close(f, clip.eval().encode_image(x, normalize=True), rtol=0, atol=1e-5)
    loop = dict(resnet=resnet_loop, vit=vit_loop, vit_mean=vit_loop).get(kind, timm_loop)
    expected = normalize(torch.stack([*loop(clip.visual, x)], dim=1), dim=-1)
    assert u.shape == (2, (size // (16 if "vit" in kind else 32)) ** 2, 24)
    torch.testing.assert_close(u, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("kind", "n"), [("resnet", 2), ("vit", 4)])
def test_positions_are_resized_with_the_input_but_not_the_class_token(kind, n, tmp_path):
    arch = write(tmp_path, TOWERS[kind])
    tables = []
    for size in (64, 96):
        torch.manual_seed(0)
        visual = cbsa.load_clip(arch, "none", size)[0].visual
        tables.append(getattr(visual, "attnpool", visual).positional_embedding)
    grid = tables[0][1:].T.reshape(1, -1, n, n)
    expected = interpolate(grid, scale_factor=1.5, mode="bicubic", antialias=True)[0]
    torch.testing.assert_close(tables[1][1:], expected.flatten(1).T)
    assert torch.equal(tables[1][0], tables[0][0])


def test_the_size_is_the_towers_own_unless_it_is_given(tmp_path):
    assert cbsa.load_clip(write(tmp_path, VIT | dict(image_size=96)), "none", 0)[2] == 96
    assert cbsa.load_clip(write(tmp_path), "none", 32)[2] == 32


@pytest.fixture
def tagged(monkeypatch, tmp_path):
    """A CLIP made with QuickGELU. Its weights have the tag openai, its names are small-quickgelu
    and small."""
    words = dict(text_cfg=TEXT | dict(vocab_size=49408))  # of CLIP's tokenizer
    quick = load(write(tmp_path, quick_gelu=True, **words))
    torch.save(quick.state_dict(), tmp_path / "clip.pth")
    colours = dict(mean=open_clip.OPENAI_DATASET_MEAN, std=open_clip.OPENAI_DATASET_STD)
    quick.visual.preprocess_cfg |= colours
    tag = colours | dict(file=tmp_path / "clip.pth")
    tags = dict(openai=tag | dict(quick_gelu=True), other=tag)
    for name, more in {"small": {}, "small-quickgelu": dict(quick_gelu=True)}.items():
        monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, name, SPEC | words | more)
        monkeypatch.setitem(open_clip.pretrained._PRETRAINED, name, tags)
    return quick.visual


def test_weights_that_were_made_with_quick_gelu_need_a_name_that_says_so(tagged, rng):
    """RN50, ViT-B-16, ..., of OpenAI."""
    images = random_images(rng, 64, 2)
    named = cbsa.load_clip("small-quickgelu", "openai", 0)[0].visual
    expected, ours = (cbsa.clip_features(tower, images)[0] for tower in (tagged, named))
    torch.testing.assert_close(ours, expected)
    assert "add -quickgelu to --arch" in refusal("small", "openai")
    other = cbsa.load_clip("small", "other", 0)[0].visual
    assert not torch.allclose(cbsa.clip_features(other, images)[0], expected, atol=1e-4)


@pytest.mark.parametrize("weights", ["openai", "none"])
def test_a_checkpoint_gives_the_same_scores_with_any_weights(tagged, rng, weights):
    images = random_images(rng, 64, 2)
    args = scinet.parse_args("--data coco --arch small-quickgelu".split())[0]
    net = scinet.build(args, ["cat", "dog"], None, None)
    args.weights = weights
    again = scinet.build(args, ["cat", "dog"], None, dict(model=net.state_dict()))
    torch.testing.assert_close(net.eval()(images), again.eval()(images))


def test_a_folder_is_looked_for_here_and_then_beside_the_script(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    arch = "local-dir:tests/toy/clip"
    assert cbsa.load_clip(arch, "none", 0)[0].visual.output_dim == 128  # that of the toy world
    write(tmp_path / "tests/toy/clip")
    assert cbsa.load_clip(arch, "none", 0)[0].visual.output_dim == 24


def refusal(arch, weights="none", size=0):
    with pytest.raises(SystemExit) as error:
        cbsa.load_clip(arch, weights, size)
    message = str(error.value)
    assert message.startswith(f"error: --arch {arch} --weights {weights} --size ")
    assert "\n" not in message
    return message


REFUSED = {  # what is in the folder, --size, words of the message
    "size of a ViT": (dict(), 72, "a multiple of 16"),
    "size of a ResNet": (dict(vision=RESNET), 80, "a multiple of 32"),
    "all tokens": (dict(vision=VIT | dict(pool_type="none")), 0, "no square map"),
    "attention at the end": (dict(vision=VIT | dict(attentional_pool=True)), 0, ""),
    "ViT of timm": (dict(vision=TIMM | dict(timm_model_name="test_vit")), 160, ""),
    "channels last": (dict(vision=TIMM | dict(timm_model_name="test_mambaout")), 0, ""),
    "text tower of SigLIP": (dict(custom_text=True), 0, "takes no prompts"),
    "other text tower": (dict(text_cfg=dict(hf_model_name="bert")), 0, "takes no prompts"),
    "other end of a text": (dict(text_cfg=TEXT | dict(pool_type="last")), 0, "takes no prompts"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_tower_that_cannot_be_used_is_refused_in_one_line(case, tmp_path):
    settings, size, words = REFUSED[case]
    assert words in refusal(write(tmp_path, **settings), size=size)


def test_a_name_that_open_clip_does_not_know_is_refused_in_one_line():
    assert "does not know it" in refusal("nosuch")


@pytest.mark.parametrize("content", [None, b"nothing of the kind"])
def test_weights_that_are_missing_or_damaged_are_refused_in_one_line(content, tmp_path):
    arch = write(tmp_path)
    if content:
        (tmp_path / "open_clip_model.pth").write_bytes(content)
    refusal(arch, "openai")


@pytest.mark.parametrize("name", ["load_clip", "clip_features", "prompt_tokens"])
def test_both_scripts_read_clip_in_the_same_words(name):
    ours, theirs = (inspect.getsource(getattr(script, name)) for script in (cbsa, scinet))
    assert ours == theirs
