# SPDX-License-Identifier: MIT
"""Makes the two networks of the toy world, trunk.pt and clip/, anew; half an hour on 2 cores.

    python tests/toy/networks.py

The trunk learns to name the one object of small photos, as ImageNet's do. The CLIP learns from
captions of scenes. None of the scenes that they learn from is in the data set.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import open_clip
import torch
from open_clip import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from safetensors.torch import save_file
from torch import Tensor, nn
from torchvision.transforms import v2
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from cbsa import clip_features  # noqa: E402
from common import normalise  # noqa: E402
from tests.toy.world import CLASSES, CONTEXTS, HERE, Trunk, draw_scene, scenes  # noqa: E402


def fit(net: nn.Module, loss: Callable[[], Tensor], steps: int, lr: float) -> nn.Module:
    """Minimise loss() over the parameters of net; returns net."""
    learned = [p for p in net.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learned, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps)
    for _ in tqdm(range(steps), mininterval=10):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
        schedule.step()
    return net.eval()


def halves(net: nn.Module) -> dict[str, Tensor]:
    state = net.state_dict().items()
    return {k: (v.half() if v.is_floating_point() else v).contiguous() for k, v in state}


def make_trunk(path: Path) -> None:
    """What ImageNet is to a real trunk: name the one object of 6,000 photos, 32 x 32."""
    rng = np.random.default_rng(2)
    n = 6000
    target = torch.tensor(rng.integers(len(CLASSES), size=n))
    photos = [draw_scene([CLASSES[c]], rng.choice(list(CONTEXTS)), 32, rng) for c in target]
    images = normalise(torch.tensor(np.stack(photos)).permute(0, 3, 1, 2))
    net = nn.Sequential(Trunk(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(96, 16))

    def loss() -> Tensor:
        k = torch.randint(n, (64,))
        return nn.functional.cross_entropy(net(images[k]), target[k])

    torch.save(halves(fit(net, loss, steps=190, lr=5e-3)[0]), path)


CLIP = dict(  # a CLIP ResNet with 4 x 4 positions
    embed_dim=128,
    quick_gelu=True,
    vision_cfg=dict(layers=[1, 2, 2, 1], width=16, image_size=128),
    text_cfg=dict(context_length=16, vocab_size=49408, width=96, heads=2, layers=2),
)
PHOTO = "a photo of a {}"
REGION = "the region showing a {}"


def write_captions(said: np.ndarray, rng: np.random.Generator) -> tuple[list[str], np.ndarray]:
    """For each row of said (2, B, C), what could be said of photo and region, a caption of one or
    two things: 2B texts, and (B, 2B), which text is right for which scene (the targets of UniCL,
    CVPR 2022)."""
    text, right = [], []
    for prompt, labels in zip((PHOTO, REGION), said, strict=True):
        chosen = np.zeros_like(labels)
        for row, there in zip(chosen, labels, strict=True):
            row[rng.permutation(np.flatnonzero(there))[: rng.integers(1, 3)]] = True
            words = " and a ".join(CLASSES[c] for c in np.flatnonzero(row))
            text.append(prompt.format(words))
        right.append((labels[:, None] >= chosen).all(-1))  # (B, B)
    return text, np.concatenate(right, axis=1)


def make_clip(folder: Path, steps: int = 4000, number: int = 20_000, batch: int = 64) -> None:
    """What OpenAI's CLIP is to real photographs: learns from captions of scenes in no data set.

    Who captions a photo misses some things and assumes others that go with the context, so that
    CLIP's ranking is mediocre; who captions a region says what is there. A photo's caption meets
    the image feature, a region's the best of the local ones.
    """
    rng = np.random.default_rng(4)
    images, y, contexts = scenes(number, seed=3)
    shown = y == 1
    home = np.repeat(np.arange(4), 4) == contexts[:, None]
    chance = np.where(shown, 0.7, 0.7 * home)
    said = np.stack((rng.random(y.shape) < chance, shown))  # (2, images, C): of photo, of region
    rows = np.flatnonzero(said.any(2).all(0))
    net = open_clip.model.CLIP(**CLIP).to(memory_format=torch.channels_last)
    net.token_embedding.requires_grad_(False)  # 49,408 random words, of which captions use 30
    tokenize = open_clip.SimpleTokenizer(context_length=CLIP["text_cfg"]["context_length"])
    net.visual.preprocess_cfg = dict(mean=OPENAI_DATASET_MEAN, std=OPENAI_DATASET_STD)
    size = CLIP["vision_cfg"]["image_size"]

    def loss() -> Tensor:
        k = rng.choice(rows, batch)
        text, right = write_captions(said[:, k], rng)
        x = torch.tensor(images[k]).permute(0, 3, 1, 2)
        x = v2.functional.resize(x, [size, size], v2.InterpolationMode.BICUBIC)
        f, u = clip_features(net.visual, x)
        t = net.encode_text(tokenize(text), normalize=True)
        local = torch.einsum("bnd,td->btn", u, t[batch:]).amax(-1)
        logits = net.logit_scale.exp() * torch.cat((f @ t[:batch].T, local), dim=1)
        target = torch.tensor(right).float()
        pairs = (logits, target), (logits.T, target.T)
        return sum(nn.functional.cross_entropy(x, r / r.sum(1, True)) for x, r in pairs) / 2

    save_clip(folder, fit(net, loss, steps, lr=1e-3), tokenize)


def save_clip(folder: Path, net: nn.Module, tokenize: Callable) -> None:
    """A folder that open_clip loads. Words of no prompt are 0, which git packs to nothing."""
    state = halves(net)
    names = [" and a ".join(CLASSES[k : k + 2]) for k in range(0, 16, 2)]
    used = tokenize([prompt.format(name) for prompt in (PHOTO, REGION) for name in names])
    unused = torch.ones(len(state["token_embedding.weight"]), dtype=torch.bool)
    unused[used] = False
    state["token_embedding.weight"][unused] = 0
    folder.mkdir(exist_ok=True)
    save_file(state, folder / "open_clip_model.safetensors")
    preprocess = net.visual.preprocess_cfg | dict(interpolation="bicubic", resize_mode="squash")
    config = json.dumps(dict(model_cfg=CLIP, preprocess_cfg=preprocess), indent=1)
    (folder / "open_clip_config.json").write_text(config + "\n")


if __name__ == "__main__":
    torch.manual_seed(0)
    make_trunk(HERE / "trunk.pt")
    make_clip(HERE / "clip")
