"""Checkpoints as other trainers write them: whole models, pickled by classes that are gone.

The network is written here from its layer table, in modules with the names that such files carry
(`models.yolo`, `models.common`), which exist only while a file is made.
"""

import contextlib
import sys
import types

import torch
from torch import nn

WIDTH = 0.25


def table():
    "The 77 layers: (where from, kind, channels out, kernel, stride)."
    rows = [(-1, "conv", 32, 3, 2), (-1, "conv", 64, 3, 2)]

    def elan(mid, out):
        rows.append((-1, "conv", mid, 1, 1))
        rows.append((-2, "conv", mid, 1, 1))
        rows.append((-1, "conv", mid, 3, 1))
        rows.append((-1, "conv", mid, 3, 1))
        rows.append(([-1, -2, -3, -4], "cat", 0, 0, 0))
        rows.append((-1, "conv", out, 1, 1))

    elan(32, 64)
    for mid, out in ((64, 128), (128, 256), (256, 512)):
        rows.append((-1, "pool", 0, 2, 2))
        elan(mid, out)
    rows += [(-1, "conv", 256, 1, 1), (-2, "conv", 256, 1, 1)]  # 29, 30
    rows += [(-1, "pool", 0, 5, 1), (-2, "pool", 0, 9, 1), (-3, "pool", 0, 13, 1)]
    rows += [([-1, -2, -3, -4], "cat", 0, 0, 0), (-1, "conv", 256, 1, 1)]  # 34, 35
    rows += [([-1, -7], "cat", 0, 0, 0), (-1, "conv", 256, 1, 1)]  # 36, 37
    for back, mid, half in ((21, 64, 128), (14, 32, 64)):  # up the neck
        rows += [(-1, "conv", half, 1, 1), (-1, "up", 0, 0, 0), (back, "conv", half, 1, 1)]
        rows.append(([-1, -2], "cat", 0, 0, 0))
        elan(mid, half)
    for back, mid, out in ((47, 64, 128), (37, 128, 256)):  # and down
        rows += [(-1, "conv", out, 3, 2), ([-1, back], "cat", 0, 0, 0)]
        elan(mid, out)
    rows += [(57, "conv", 128, 3, 1), (65, "conv", 256, 3, 1), (73, "conv", 512, 3, 1)]
    return rows


def scaled(channels):
    return max(round(channels * WIDTH / 8), 1) * 8


class Conv(nn.Module):
    def __init__(self, i, o, k, s, act=None):
        super().__init__()
        self.conv = nn.Conv2d(i, o, k, s, k // 2, bias=False)
        self.bn = nn.BatchNorm2d(o, eps=1e-3, momentum=0.03)
        self.act = act or nn.LeakyReLU(0.1, inplace=True)

    def forward(self, x):
        return self.act(self.bn(self.conv(x)))

    def fuseforward(self, x):
        return self.act(self.conv(x))

    @torch.no_grad()
    def fuse(self):
        scale = self.bn.weight / (self.bn.running_var + self.bn.eps).sqrt()
        self.conv.weight *= scale[:, None, None, None]
        self.conv.bias = nn.Parameter(self.bn.bias - self.bn.running_mean * scale)
        del self.bn
        self.forward = self.fuseforward


class Concat(nn.Module):
    def forward(self, xs):
        return torch.cat(xs, 1)


class ImplicitA(nn.Module):
    def __init__(self, channels, mean=0.0):
        super().__init__()
        self.implicit = nn.Parameter(mean + 0.02 * torch.randn(1, channels, 1, 1))


class CBAM(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.fc = nn.Sequential(
            nn.Conv2d(channels, channels // 16, 1, bias=False),
            nn.ReLU(),
            nn.Conv2d(channels // 16, channels, 1, bias=False),
        )
        self.spatial = nn.Conv2d(2, 1, 7, padding=3, bias=False)

    def forward(self, x):
        pooled = x.mean((2, 3), keepdim=True), x.amax((2, 3), keepdim=True)
        x = x * (self.fc(pooled[0]) + self.fc(pooled[1])).sigmoid()
        place = torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], 1)
        return x * self.spatial(place).sigmoid()


class Detect(nn.Module):
    "Last layer: buffers of anchors in cells and in px."

    def __init__(self):
        super().__init__()
        px = torch.tensor(
            [
                [[10, 13], [16, 30], [33, 23]],
                [[30, 61], [62, 45], [59, 119]],
                [[116, 90], [156, 198], [373, 326]],
            ]
        ).float()
        self.register_buffer("anchors", px / torch.tensor([8, 16, 32])[:, None, None])
        self.register_buffer("anchor_grid", px.view(3, 1, 3, 1, 1, 2))


class IDetect(Detect):
    def __init__(self, nc, channels):
        super().__init__()
        self.nc = nc
        self.m = nn.ModuleList(nn.Conv2d(c, 3 * (5 + nc), 1) for c in channels)
        self.ia = nn.ModuleList(ImplicitA(c) for c in channels)
        self.im = nn.ModuleList(ImplicitA(3 * (5 + nc), 1.0) for _ in channels)

    def forward(self, xs):
        parts = zip(self.m, self.ia, self.im, xs, strict=True)
        return [im.implicit * m(x + ia.implicit) for m, ia, im, x in parts]

    def fuseforward(self, xs):
        return [m(x) for m, x in zip(self.m, xs, strict=True)]

    @torch.no_grad()
    def fuse(self):
        for m, ia, im in zip(self.m, self.ia, self.im, strict=True):
            m.bias += (m.weight.flatten(1) @ ia.implicit.flatten(1).T).flatten()
            m.bias *= im.implicit.flatten()
            m.weight *= im.implicit.view(-1, 1, 1, 1)
        self.forward = self.fuseforward


class HeadConfig:
    def __init__(self, groups):
        self.num_heads = len(groups)
        self.heads = [
            {"head_id": h, "name": f"group{h}", "weight": 1.5, "classes": list(group)}
            for h, group in enumerate(groups)
        ]


class MultiHeadDetect(Detect):
    def __init__(self, groups, channels, attention=False, full_head=False):
        super().__init__()
        self.head_config = HeadConfig(groups)
        nc = sum(map(len, groups))
        sizes = [nc if full_head else len(group) for group in groups]
        self.heads = nn.ModuleList(
            nn.ModuleList(nn.Conv2d(c, 3 * (5 + n), 1) for c in channels) for n in sizes
        )
        if attention:
            self.attentions = nn.ModuleList(
                nn.ModuleList(CBAM(c) for c in channels) for _ in groups
            )

    def forward(self, xs):
        out = []
        for h, head in enumerate(self.heads):
            blocks = self.attentions[h] if hasattr(self, "attentions") else [nn.Identity()] * 3
            out.append([m(block(x)) for m, block, x in zip(head, blocks, xs, strict=True)])
        return out


class Model(nn.Module):
    def __init__(self, names, last, act=None):
        super().__init__()
        self.names, self.nc, self.yaml = list(names), len(names), {"nc": len(names)}
        channels, layers = [3], []
        for i, (source, kind, o, k, s) in enumerate(table()):
            sources = source if isinstance(source, list) else [source]
            ins = [channels[f if f < 0 else f + 1] for f in sources]
            if kind == "conv":
                layer = Conv(ins[0], scaled(o), k, s, act)
                channels.append(scaled(o))
            elif kind == "cat":
                layer = Concat()
                channels.append(sum(ins))
            else:
                up = nn.Upsample(scale_factor=2, mode="nearest")
                layer = up if kind == "up" else nn.MaxPool2d(k, s, 0 if s == 2 else k // 2)
                channels.append(ins[0])
            layer.f, layer.i = source, i
            layers.append(layer)
        layers.append(last([channels[f + 1] for f in (74, 75, 76)]))
        layers[-1].f, layers[-1].i = [74, 75, 76], 77
        self.model = nn.Sequential(*layers)

    def forward(self, x):
        seen = []
        for layer in self.model:
            if isinstance(layer.f, list):
                x = layer([x if f == -1 else seen[f] for f in layer.f])
            elif layer.f == -1:
                x = layer(x)
            else:
                x = layer(seen[layer.f])
            seen.append(x)
        return x

    def fuse(self):
        for module in self.modules():
            if hasattr(module, "fuse") and module is not self:
                module.fuse()
        return self


PLACES = {
    "models.common": (Conv, Concat, ImplicitA, CBAM),
    "models.yolo": (Detect, IDetect, MultiHeadDetect, Model),
    "utils.head_config": (HeadConfig,),
}


@contextlib.contextmanager
def their_modules():
    "The modules that the classes are pickled from, gone again afterwards."
    for name, classes in PLACES.items():
        for part in (name.split(".")[0], name):
            sys.modules.setdefault(part, types.ModuleType(part))
        for kind in classes:
            kind.__module__ = name
            setattr(sys.modules[name], kind.__name__, kind)
    try:
        yield
    finally:
        for name in PLACES:
            sys.modules.pop(name, None)
            sys.modules.pop(name.split(".")[0], None)


def trained(model, seed=0):
    "The model with weights and statistics as after a training, in eval mode."
    torch.manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.2)
            module.running_var.uniform_(0.5, 2)
            nn.init.uniform_(module.weight, 0.8, 1.6)
            nn.init.normal_(module.bias, 0, 0.2)
    return model.eval()


def one_head(names, seed=0, act=None):
    torch.manual_seed(seed)
    return trained(Model(names, lambda channels: IDetect(len(names), channels), act), seed)


def several_heads(names, groups, seed=0, **form):
    torch.manual_seed(seed)
    return trained(Model(names, lambda channels: MultiHeadDetect(groups, channels, **form)), seed)


def save(path, tree, **more):
    with their_modules():
        torch.save(tree, path, **more)
    return path
