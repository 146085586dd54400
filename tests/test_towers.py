# SPDX-License-Identifier: MIT
"""Every kind of image tower that open_clip loads: against open_clip's own features and a loop."""

import json

import open_clip
import pytest
import torch
from torch.nn.functional import linear, normalize

import cbsa
import common
from tests.conftest import random_images

TEXT = dict(context_length=16, vocab_size=512, width=64, heads=1, layers=1)
VIT = dict(layers=2, width=64, head_width=64, patch_size=16, image_size=64)
TOWERS = {  # kind: vision_cfg, sizes, and modules of the last stage and after
    "resnet": (dict(layers=[1, 1, 1, 1], width=8, image_size=64), (64, 96), "layer4 attnpool"),
    "vit": (VIT, (64, 96), "transformer.resblocks.1 ln_post proj"),
    "vit-mean": (VIT | dict(pool_type="avg", ls_init_value=0.1), (64,), ""),
    "convnext": (
        dict(timm_model_name="test_convnext", timm_pool="", image_size=64), (64, 96),
        "trunk.stages.3 trunk.head head",
    ),
    "efficientnet": (
        dict(timm_model_name="test_efficientnet", timm_pool="avg", timm_proj="mlp"), (64,),
        "trunk.blocks.4 trunk.conv_head trunk.bn2 head",
    ),
}  # fmt: skip
CASES = [(kind, size) for kind, (_, sizes, _) in TOWERS.items() for size in sizes]


def write_folder(folder, vision, text=(), **more):
    """A folder of open_clip, without weights; its name as --arch takes it."""
    spec = dict(embed_dim=24, vision_cfg=vision, text_cfg=TEXT | dict(text)) | more
    cfg = dict(mean=[0.1, 0.2, 0.3], std=[0.4, 0.5, 0.6])
    folder.mkdir(exist_ok=True)
    content = json.dumps(dict(model_cfg=spec, preprocess_cfg=cfg))
    (folder / "open_clip_config.json").write_text(content)
    return f"local-dir:{folder}"


def make(folder, kind, size=64):
    """A CLIP with weights that are all random: no bias or scale keeps its neutral start."""
    clip = common.load_clip(write_folder(folder, TOWERS[kind][0]), "none", size)[0]
    for p in clip.parameters():
        p.data += 0.05 * torch.randn_like(p)
    return clip


def pixels(visual, images):
    cfg = visual.preprocess_cfg
    return common.normalise(images, cfg["mean"], cfg["std"])


@torch.no_grad()
def assert_open_clips_own(clip, size, rng):
    images = random_images(rng, size, 2)
    f, u = common.clip_features(clip.visual, images)
    expected = clip.encode_image(pixels(clip.visual, images), normalize=True)
    assert f.ndim == 2
    torch.testing.assert_close(f, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(u.norm(dim=-1), torch.ones(u.shape[:2]))
    return images, u


def resnet_loop(visual, x):
    """The value of the attention pool, position by position of the map."""
    for step in (visual.stem, visual.layer1, visual.layer2, visual.layer3, visual.layer4):
        x = step(x)
    pool, n = visual.attnpool, x.shape[-1]
    for i in range(n * n):
        value = pool.v_proj(x[:, :, i // n, i % n] + pool.positional_embedding[1 + i])
        yield pool.c_proj(value)


def vit_loop(visual, x):
    """MaskCLIP: the last block with the value in the place of the attention's output."""
    x, D = visual._embeds(x), visual.conv1.out_channels
    *before, last = visual.transformer.resblocks
    for block in before:
        x = block(x)
    for i in range(1, x.shape[1]):  # 0 is the class token
        v = linear(last.ln_1(x[:, i]), last.attn.in_proj_weight[-D:], last.attn.in_proj_bias[-D:])
        y = x[:, i] + last.ls_1(last.attn.out_proj(v))
        y = y + last.ls_2(last.mlp(last.ln_2(y)))
        yield visual.ln_post(y) @ visual.proj


def timm_loop(visual, x):
    """The head, on a map of one position."""
    x = visual.trunk.forward_features(x)
    maps = [x[:, :, r : r + 1, c : c + 1] for r in range(x.shape[2]) for c in range(x.shape[3])]
    return (visual.head(visual.trunk.forward_head(one)) for one in maps)


@pytest.mark.parametrize(("kind", "size"), CASES)
def test_features_are_open_clips_and_local_ones_a_loop_over_positions(kind, size, tmp_path, rng):
    clip = make(tmp_path / "clip", kind, size)
    images, u = assert_open_clips_own(clip, size, rng)
    side = 16 if kind.startswith("vit") else 32
    assert u.shape == (2, (size // side) ** 2, 24)  # a square, without class token
    loop = dict(resnet=resnet_loop, vit=vit_loop).get(kind.split("-")[0], timm_loop)
    with torch.no_grad():
        expected = [*loop(clip.visual, pixels(clip.visual, images))]
    assert len(expected) == u.shape[1]
    for i, one in enumerate(expected):
        torch.testing.assert_close(u[:, i], normalize(one, dim=-1), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["RN50-quickgelu", "ViT-B-16-quickgelu", "convnext_tiny"])
def test_real_architectures(name, tmp_path, rng):
    """One by its name; the towers of the others beside a small text tower, which is made faster."""
    spec = open_clip.get_model_config(name)
    more = dict(embed_dim=spec["embed_dim"], quick_gelu=spec.get("quick_gelu", False))
    by_name, folder = "ViT" in name, write_folder(tmp_path, spec["vision_cfg"], **more)
    clip, tokenize = common.load_clip(name if by_name else folder, "none", 64)
    _, u = assert_open_clips_own(clip, 64, rng)
    assert u.shape == (2, 16 if by_name else 4, spec["embed_dim"])
    assert (tokenize(["a photo of a boat"]) > 0).any()


@pytest.mark.parametrize("kind", ["resnet", "vit", "convnext"])
def test_local_features_work_in_half_precision(kind, tmp_path, rng):
    clip = make(tmp_path / "clip", kind, size := TOWERS[kind][1][0])
    images = random_images(rng, size, 2)
    with torch.no_grad():
        exact = common.clip_features(clip.visual, images)
        with torch.autocast("cpu", torch.bfloat16):
            rough = common.clip_features(clip.visual, images)
    for a, b in zip(exact, rough, strict=True):
        assert b.dtype == torch.float32 and (a * b).sum(-1).min() > 0.98


def test_a_vit_of_another_size_is_open_clips(tmp_path, rng):
    """Weights of 64 pixels, used at 96: as with open_clip's own force_image_size."""
    clip, arch = make(tmp_path / "clip", "vit"), f"local-dir:{tmp_path}/clip"
    torch.save(clip.state_dict(), tmp_path / "clip/open_clip_model.pth")
    expected = open_clip.create_model(arch, force_image_size=96).eval()
    x = pixels(expected.visual, images := random_images(rng, 96, 2))
    f = common.clip_features(common.load_clip(arch, "default", 96)[0].visual, images)[0]
    expected = expected.encode_image(x, normalize=True)
    torch.testing.assert_close(f, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", [kind for kind in TOWERS if TOWERS[kind][2]])
def test_last_stage_is_chosen_by_name_and_learns(kind, tmp_path, rng):
    visual, stage = make(tmp_path / "clip", kind).visual, TOWERS[kind][2].split()
    chosen = cbsa.last_stage(visual.requires_grad_(False))
    for p in chosen:
        p.requires_grad_(True)
    names = [name for name, p in visual.named_parameters() if p.requires_grad]
    assert len(names) == len(chosen) == len({*map(id, chosen)})
    for name, _ in visual.named_parameters():
        assert (name in names) == any(f"{name}.".startswith(f"{part}.") for part in stage), name
    f, u = common.clip_features(visual, random_images(rng, 64, 2))
    (f.std(0).sum() + u.std(1).sum()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in chosen)


def equal_weights(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


def test_weights_none_reads_no_file_of_the_folder(tmp_path):
    clip, arch = make(tmp_path / "clip", "vit"), f"local-dir:{tmp_path}/clip"
    file = tmp_path / "clip/open_clip_model.pth"
    torch.save(clip.state_dict(), file)
    assert equal_weights(common.load_clip(arch, "default", 64)[0], clip)
    assert not equal_weights(common.load_clip(arch, "none", 64)[0], clip)
    file.rename(tmp_path / "moved.pth")
    assert equal_weights(common.load_clip(arch, f"{tmp_path}/moved.pth", 64)[0], clip)
    file.write_bytes(b"nothing of the kind")
    common.load_clip(arch, "none", 64)
    with pytest.raises(common.InputError, match="local-dir"):
        common.load_clip(arch, "default", 64)


def write_torchscript(clip, path):
    """As OpenAI published its models: half precision, and three numbers among the weights."""
    root = torch.nn.Module()
    numbers = dict(input_resolution=64, context_length=16, vocab_size=512)
    extra = {name: torch.tensor(number) for name, number in numbers.items()}
    for name, tensor in (clip.state_dict() | extra).items():
        *parents, leaf = name.split(".")
        module = root
        for parent in parents:
            if not hasattr(module, parent):
                module.add_module(parent, torch.nn.Module())
            module = getattr(module, parent)
        module.register_buffer(leaf, tensor.half() if tensor.is_floating_point() else tensor)
    torch.jit.script(root).save(str(path))


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_torchscript_is_refused_by_a_line_that_names_the_conversion(tmp_path):
    clip = make(tmp_path / "clip", "resnet")
    write_torchscript(clip, path := tmp_path / "RN50.pt")
    arch = write_folder(tmp_path / "quick", TOWERS["resnet"][0], quick_gelu=True)
    with pytest.raises(common.InputError, match="TorchScript.*load_openai_model") as error:
        common.load_clip(arch, str(path), 64)
    assert "\n" not in str(error.value)
    torch.save(clip.state_dict(), path)  # converted
    assert equal_weights(common.load_clip(arch, str(path), 64)[0], clip)


def timm(name, pool="", proj="linear"):
    return dict(timm_model_name=name, timm_pool=pool, timm_proj=proj, image_size=64)


REFUSED = {  # what the folder says beside TEXT, size, word of the message
    "class token": (dict(vision=timm("test_vit")), 64, "pools neither"),
    "class token, mean": (dict(vision=timm("test_vit2", "avg")), 64, "pools neither"),
    "tokens": (dict(vision=timm("test_vit_relpos") | dict(image_size=160)), 160, "pools neither"),
    "channels-last": (dict(vision=timm("test_mambaout", "avg", "")), 64, "pools neither"),
    "latent attention": (dict(vision=timm("test_vit3", "map", "")), 64, "pools"),
    "attention of a ViT": (dict(vision=VIT | dict(attentional_pool=True)), 64, "pools"),
    "head of another width": (dict(vision=timm("mobilenetv3_small_050", "avg")), 64, "pools"),
    "one block": (dict(vision=VIT | dict(layers=1)), 64, "pools"),
    "no tower of timm": (dict(vision=timm("nosuch")), 64, "nosuch"),
    "no pool": (dict(vision=timm("test_convnext", "", "")), 64, "[1, 24, 2, 2]"),
    "patch": (dict(vision=VIT), 72, "a multiple of 16"),
    "stride": (dict(vision=TOWERS["resnet"][0]), 80, "a multiple of 32"),
    "custom text": (dict(vision=VIT, custom_text=True), 64, "no prompts"),
    "transformers": (dict(vision=VIT, text=dict(hf_model_name="roberta-base")), 64, "no prompts"),
    "no causal mask": (dict(vision=VIT, text=dict(no_causal_mask=True)), 64, "no prompts"),
    "other end of text": (dict(vision=VIT, text=dict(pool_type="last")), 64, "no prompts"),
    "numbered end": (dict(vision=VIT, text=dict(pool_type="eos", eos_id=2)), 64, "no prompts"),
    "biased projection": (dict(vision=VIT, text=dict(proj_bias=True)), 64, "no prompts"),
    "no projection": (dict(vision=VIT, text=dict(proj_type="none")), 64, "no prompts"),
    "class token of text": (dict(vision=VIT, text=dict(embed_cls=True)), 64, "no prompts"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_work_is_refused_by_a_line_that_names_what_does(case, tmp_path):
    more, size, word = REFUSED[case]
    arch = write_folder(tmp_path / "clip", **more)
    with pytest.raises(common.InputError) as error:
        common.load_clip(arch, "none", size)
    message = str(error.value)
    assert word in message and "\n" not in message and "RN50-quickgelu" in message
    assert f"--arch {arch} --weights none --size {size}" in message


@pytest.mark.parametrize(
    ("arch", "weights", "word"),
    [
        ("nosuch", "none", "unknown"),
        ("local-dir:nowhere", "none", "nowhere"),
        ("ViT-B-16-SigLIP", "none", "no prompts"),
        ("roberta-ViT-B-32", "none", "no prompts"),
        ("coca_ViT-B-32", "none", "no prompts"),
        ("MobileCLIP-S1", "none", "no prompts"),
        ("ViT-H-14-worldwide", "none", "no prompts"),
        ("RN50", "default", "-quickgelu"),
        ("ViT-B-16", "openai", "-quickgelu"),
        ("convnext_tiny", "default", "openai"),
        ("RN50-quickgelu", "nowhere.pt", "nowhere.pt"),
        ("local-dir:tests/toy_clip", "nowhere.pt", "nowhere.pt"),
    ],
)
def test_names_that_cannot_work_are_refused(arch, weights, word):
    with pytest.raises(common.InputError, match=word):
        common.load_clip(arch, weights, 224)
