"""Weight files of others: what is in them is read, and nothing in them runs.

Checkpoints are made by classes that are gone when they are read (`reference_models`), and by hand
where they are hostile.
"""

import copy
import encodings.cp437  # noqa: F401 (zipfile imports it when it meets a name)
import io
import json
import os
import pickle
import struct
import sys
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
import reference_models as theirs
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn

import mhdet.cli.commands  # noqa: F401 (registers the commands)
from mhdet.cli.grammar import run_line
from mhdet.core.config import load_config
from mhdet.data.toy import toy_dataset
from mhdet.experiment.models import build, load_run
from mhdet.model.detector import Detector
from mhdet.model.multihead import per_anchor
from mhdet.model.pickles import TorchFile, read_pickle
from mhdet.model.weight_files import read_checkpoint, read_tensors, to_foreign
from mhdet.model.weights import load_foreign
from mhdet.partition.heads import Head, Partition, load_heads, save_heads
from mhdet.tools.onnx import onnx_facts, run_onnx

ROOT = Path(__file__).resolve().parents[1]
NAMES = ["person", "car", "truck", "bus", "cat", "dog", "cup"]
GROUPS = [[0], [1, 4, 6], [2, 3, 5]]
THREE = Partition([Head(f"group{h}", group, 1.5) for h, group in enumerate(GROUPS)], NAMES, "file")

# What Python reports while a file is read: sys.addaudithook cannot be taken back, so it is armed.
EVENTS, ARMED = [], []
RUNS = ("os.system", "os.exec", "os.posix_spawn", "os.fork", "subprocess.Popen", "exec", "compile")
RUNS += ("pickle.find_class", "ctypes.dlopen", "socket.connect", "os.remove", "shutil.rmtree")
READ_ONLY = (None, "r", "rb")


def _watch(event, args):
    if ARMED and (event in RUNS or event == "import"):
        EVENTS.append((event, *args[:1]))
    elif ARMED and event == "open" and args[1] not in READ_ONLY:
        EVENTS.append((event, *args[:2]))


sys.addaudithook(_watch)


@pytest.fixture
def quiet(tmp_path_factory):
    "Nothing may run while a file is read; what is imported by reading a harmless file, may."
    read_something(tmp_path_factory.mktemp("harmless") / "x.pt")
    EVENTS.clear()
    ARMED.append(1)
    yield
    ARMED.clear()
    assert not EVENTS


def read_something(path):
    for new_format in (True, False):
        torch.save({"a": torch.zeros(1)}, path, _use_new_zipfile_serialization=new_format)
        read_checkpoint(path)


class Call:
    "Pickles as a call of any function."

    def __init__(self, function, *args):
        self.reduced = function, args

    def __reduce__(self):
        return self.reduced


def bombs(boom):
    "Objects that would make a file when they are unpickled."
    command = f"touch {boom}"
    nested = Call(list, (Call(os.system, command),))
    return {
        "os.system": Call(os.system, command),
        "nested": {"model": {"a": [(nested, {"b": nested})]}},
        "eval": Call(eval, f"open({str(boom)!r}, 'w')"),
        "open": Call(open, str(boom), "w"),
        "getattr": Call(getattr, "text", "upper"),
        "as_key": {Call(os.system, command): 1},
        "loads": Call(pickle.loads, pickle.dumps(Call(os.system, command))),
        "torch.load": Call(torch.storage._load_from_bytes, pickle.dumps(Call(os.system, command))),
    }


BOMBS = list(bombs("boom"))


@pytest.mark.parametrize("new_format", [True, False])
@pytest.mark.parametrize("kind", BOMBS)
def test_nothing_in_a_file_runs(tmp_path, kind, new_format, quiet):
    ARMED.clear()
    boom = tmp_path / "boom"
    tree = {"model": {"a": torch.ones(3)}, "more": bombs(boom)[kind]}
    torch.save(tree, tmp_path / "x.pt", _use_new_zipfile_serialization=new_format)
    boom.unlink(missing_ok=True)
    ARMED.append(1)
    assert read_tensors(tmp_path / "x.pt")["a"].tolist() == [1, 1, 1]
    assert not boom.exists()


class InMetadata(torch.Tensor):
    "A tensor whose pickle carries a call among what rebuilds it."

    boom = None

    def __reduce_ex__(self, protocol):
        function, args = torch.ones(3).__reduce_ex__(protocol)
        return function, (*args, Call(os.system, f"touch {InMetadata.boom}"))


def test_a_call_in_the_metadata_of_a_tensor(tmp_path, quiet):
    ARMED.clear()
    InMetadata.boom = tmp_path / "boom"
    torch.save({"a": torch.ones(3).as_subclass(InMetadata)}, tmp_path / "x.pt")
    ARMED.append(1)
    assert read_tensors(tmp_path / "x.pt")["a"].tolist() == [1, 1, 1]
    assert not InMetadata.boom.exists()


def pair(name, content):
    return [(name, content)]


def rezip(source, target, change, compression=zipfile.ZIP_STORED):
    "A zip again, its entries as `change(name, content)` says: pairs of name and content."
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", compression) as new:
        for name in old.namelist():
            for entry in change(name, old.read(name)):
                new.writestr(*entry)
    return target


def test_names_in_a_zip_lead_nowhere(tmp_path, quiet):
    ARMED.clear()
    torch.save({"a": torch.ones(3)}, tmp_path / "x.pt")

    def outside(name, content):
        return [(f"../../{tmp_path.name}/boom/{name}", content), (f"{tmp_path}/boom", b"x")][:2]

    def double(name, content):
        yield name.replace("x/", f"{tmp_path}/../x/"), content

    for k, change in enumerate((outside, double)):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # two entries of one name
            rezip(tmp_path / "x.pt", tmp_path / f"{k}.pt", change)
    ARMED.append(1)
    for k in range(2):
        assert read_tensors(tmp_path / f"{k}.pt")["a"].tolist() == [1, 1, 1]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["0.pt", "1.pt", "x.pt"]


def a_pickle(*steps):
    return b"\x80\x02" + b"".join(steps) + b"."


def persistent(*values):
    "A persistent id made of pickled values."
    body = b"".join(pickle.dumps(v, 2)[2:-1] for v in values)
    return b"(" + body + b"tQ"


FLOATS = b"ctorch\nFloatStorage\n"
TUPLE = b"(" + pickle.dumps("storage", 2)[2:-1] + FLOATS + pickle.dumps("0", 2)[2:-1]
STORAGE = TUPLE + pickle.dumps("cpu", 2)[2:-1] + b"K\x04tQ"  # four elements


def tensor(offset=0, size=(4,), stride=(1,)):
    rest = b"".join(pickle.dumps(v, 2)[2:-1] for v in (offset, size, stride))
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + STORAGE + rest + b"\x89NtR"


def deep_key():
    value = ()
    for _ in range(100):
        value = (value, value)
    return a_pickle(b"}", pickle.dumps(value, 2)[2:-1], b"K\x01s")


REBUILD = b"ctorch._tensor\n_rebuild_from_type_v2\n"
HOSTILE = {
    "a storage of another kind": a_pickle(persistent("storage", "FloatStorage", "0", "cpu", 4)),
    "a persistent id that is text": a_pickle(pickle.dumps("0", 2)[2:-1] + b"Q"),
    "a key whose hash is endless": deep_key(),
    "a list as a key": a_pickle(b"}]K\x01s"),
    "more than the storage": a_pickle(tensor(size=(5,))),
    "stretched": a_pickle(tensor(size=(10**9, 10**9), stride=(0, 0))),
    "before the storage": a_pickle(tensor(offset=-1, size=(1,))),
    "sizes that are no numbers": a_pickle(tensor(size=("a",))),
    "sizes past 64 bits": a_pickle(tensor(size=(2**70,))),
    "an unknown memo": a_pickle(b"h\x07"),
    "an empty stack": a_pickle(b"R"),
    "no mark": a_pickle(b"t"),
    "an extension": a_pickle(b"\x82\x01"),
    "a buffer": b"\x80\x05\x97.",
    "half": a_pickle(tensor())[:-9],
    "4 GB of text": a_pickle(b"X\xff\xff\xff\xff"),
    "exabytes": b"\x80\x04\x8e" + struct.pack("<Q", 2**60) + b".",
    "a number of 5,000 digits": a_pickle(b"I" + b"9" * 5000 + b"\n"),
    "nested calls": a_pickle(b")q\x00", (REBUILD + b"Nh\x00\x87q\x00") * 5000, REBUILD + b"h\x00R"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_pickle_is_refused_in_one_line(tmp_path, kind, quiet):
    with pytest.raises(ValueError) as e:
        read_pickle(io.BytesIO(HOSTILE[kind]))
    assert "\n" not in str(e.value) and len(str(e.value)) < 250, e.value
    assert str(e.value).startswith("pickle: byte ")


@pytest.mark.parametrize("kind", [*HOSTILE, "loop"])
def test_a_hostile_file_is_refused_by_name(tmp_path, kind, quiet):
    ARMED.clear()
    content = HOSTILE.get(kind, a_pickle(b"]q\x00h\x00a"))  # a list that holds itself
    torch.save({"a": torch.ones(4)}, tmp_path / "x.pt")

    def change(name, old):
        yield name, content if name.endswith("data.pkl") else old

    rezip(tmp_path / "x.pt", tmp_path / "y.pt", change)
    (tmp_path / "raw.pt").write_bytes(content)
    ARMED.append(1)
    for name in ("y.pt", "raw.pt"):
        with pytest.raises(ValueError, match=f"{name}: no readable weights") as e:
            read_checkpoint(tmp_path / name)
        assert "\n" not in str(e.value)


def test_modules_without_end(tmp_path):
    inner = nn.Module()
    inner.register_parameter("w", nn.Parameter(torch.ones(1)))
    for _ in range(40):  # each holds the next twice: 2 ** 40 names
        outer = nn.Module()
        outer.a = outer.b = inner
        inner = outer
    torch.save(inner, tmp_path / "x.pt")
    with pytest.raises(ValueError, match=r"x.pt: .* more than 100,000 modules and tensors"):
        read_checkpoint(tmp_path / "x.pt")
    loop = nn.Module()
    loop._modules["again"] = loop
    torch.save(loop, tmp_path / "loop.pt")
    with pytest.raises(ValueError, match="modules inside modules, more than 64 deep"):
        read_checkpoint(tmp_path / "loop.pt")


def test_many_views_of_one_storage_do_not_fill_the_memory(tmp_path):
    x = torch.zeros(500_000)
    torch.save({f"view{i}": x.view(500_000) for i in range(100)}, tmp_path / "x.pt")
    with pytest.raises(ValueError, match="x.pt: .* more numbers than the file"):
        read_checkpoint(tmp_path / "x.pt")


def test_damaged_files(tmp_path):
    torch.save({"a": torch.ones(1000), "b": torch.ones(7)}, tmp_path / "new.pt")
    torch.save({"a": torch.ones(1000)}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    for name in ("new.pt", "old.pt"):
        whole = (tmp_path / name).read_bytes()
        for share in (0, 0.02, 0.3, 0.7, 0.99):
            (tmp_path / "cut.pt").write_bytes(whole[: int(share * len(whole))])
            with pytest.raises(ValueError, match="cut.pt: no readable weights") as e:
                read_checkpoint(tmp_path / "cut.pt")
            assert "\n" not in str(e.value)
    flipped = bytearray((tmp_path / "new.pt").read_bytes())
    flipped[2000] ^= 255  # in the numbers: the zip has a checksum of them
    (tmp_path / "flip.pt").write_bytes(flipped)
    with pytest.raises(ValueError, match="flip.pt: .*damaged zip .*CRC"):
        read_checkpoint(tmp_path / "flip.pt")
    rezip(tmp_path / "new.pt", tmp_path / "small.pt", pair, zipfile.ZIP_DEFLATED)
    with pytest.raises(ValueError, match="is compressed, which torch.save never does"):
        read_checkpoint(tmp_path / "small.pt")
    (tmp_path / "picture.pt").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(100))
    (tmp_path / "plain.pt").write_bytes(pickle.dumps({"a": 1}))
    torch.jit.script(nn.Linear(2, 2)).save(tmp_path / "script.pt")
    for name, words in {
        "picture.pt": "neither a zip nor a pickle",
        "plain.pt": "not one of torch.save",
        "script.pt": "a TorchScript program",
    }.items():
        with pytest.raises(ValueError, match=f"{name}: .*{words}"):
            read_checkpoint(tmp_path / name)


# Whole models


def images():
    return torch.rand(2, 3, 64, 96, generator=torch.Generator().manual_seed(1))


def apart(raws, detector):
    "Raw maps of each stored head and level, taken from those of the fused layer."
    head, out = detector.head, []
    for part in head.partition.heads:
        h, levels = len(out), []
        for raw in raws:
            view = per_anchor(raw, 3)
            channels = [*range(5 * h, 5 * h + 5), *(5 * head.nh + c for c in part.classes)]
            levels.append(view[..., channels])
        out.append(levels)
    return out


@torch.no_grad()
def difference(original, detector, rows=None):
    "Largest difference of the raw maps of a reference model and of a detector."
    expected, raws = original(images()), apart(detector(images()), detector)
    expected = expected if isinstance(expected[0], list) else [expected]
    differences = []
    for h, levels in enumerate(expected):
        for level, raw in zip(levels, raws[h], strict=True):
            view = per_anchor(level, 3)
            view = view if rows is None else view[..., rows[h]]
            differences.append((view - raw).abs().max().item())
    return max(differences)


def load(path, *args, **more):
    assert not {"models", "models.yolo", "models.common"} & set(sys.modules)
    EVENTS.clear()
    ARMED.append(1)
    try:
        return load_foreign(path, *args, **more)
    finally:
        ARMED.clear()
        assert not [e for e in EVENTS if "models" in str(e) or e[0] in RUNS], EVENTS


@pytest.fixture(scope="module")
def single():
    return theirs.one_head(NAMES)


def test_the_network_written_from_the_table(single):
    state = to_foreign(Detector.make(Partition.single(NAMES), theirs.WIDTH, implicit=True))
    own = {k: tuple(v.shape) for k, v in single.state_dict().items()}
    assert own == {k: tuple(v.shape) for k, v in state.items()}


@pytest.mark.parametrize("new_format", [True, False])
def test_a_training_checkpoint(tmp_path, single, new_format):
    last = theirs.one_head(NAMES, seed=7)
    optimizer = torch.optim.SGD(single.parameters(), 0.1, momentum=0.9)
    tree = dict(epoch=3, best_fitness=0.5, model=last, ema=single, updates=9)
    tree["optimizer"] = optimizer.state_dict()
    path = tmp_path / "last.pt"
    theirs.save(path, tree, _use_new_zipfile_serialization=new_format)
    detector = load(path)
    assert difference(single, detector) < 1e-5  # the average, not the last weights
    assert detector.head.partition.names == NAMES
    tree["ema"] = None
    assert difference(last, load(theirs.save(path, tree))) < 1e-5
    file = read_checkpoint(path)
    assert (file.kind, file.names, file.heads) == ("models.yolo.Model", NAMES, None)
    assert file.tensors.keys() == single.state_dict().keys()


def test_half_precision(tmp_path, single):
    half = theirs.save(tmp_path / "best.pt", {"model": copy.deepcopy(single).half(), "ema": None})
    detector = load(half)
    assert next(detector.parameters()).dtype == torch.float32
    assert difference(single, detector) < 1e-2


def test_fused(tmp_path, single):
    fused = copy.deepcopy(single).fuse()
    assert difference(fused, load_foreign(single.state_dict(), Partition.single(NAMES))) < 1e-4
    for tree in (fused, {"model": fused}, {"model": fused.state_dict()}):
        path = theirs.save(tmp_path / "fused.pt", tree)
        assert difference(single, load(path)) < 1e-5
        assert difference(single, load(path, implicit=True)) < 1e-5
    trunk_only = copy.deepcopy(single)
    for module in trunk_only.modules():
        if isinstance(module, theirs.Conv):
            module.fuse()
    path = theirs.save(tmp_path / "half_fused.pt", {"model": trunk_only})
    assert difference(single, load(path)) < 1e-5  # the vectors are still outside
    assert mhdet("convert half_fused.pt", tmp_path)[0] == 0
    assert difference(single, load(tmp_path / "half_fused.safetensors")) < 1e-5


def test_another_epsilon_of_the_normalisation(tmp_path):
    model = theirs.one_head(NAMES)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps = 0.01
    path = theirs.save(tmp_path / "best.pt", {"model": model})
    assert difference(model, load(path)) < 1e-5
    assert mhdet("convert best.pt", tmp_path)[0] == 0
    assert difference(model, load(tmp_path / "best.safetensors")) < 1e-5


def test_implicit_vectors_are_folded_or_kept(tmp_path, single):
    path = tmp_path / "state.pt"
    torch.save(single.state_dict(), path)
    folded, kept = load(path), load(path, implicit=True)
    assert folded.head.ia is None and len(kept.head.ia) == 3
    assert difference(single, folded) < 1e-5
    assert difference(single, kept) < 1e-5


FORMS = {"plain": {}, "attention": {"attention": True}}


@pytest.mark.parametrize("form", FORMS)
def test_several_heads(tmp_path, form):
    model = theirs.several_heads(NAMES, GROUPS, **FORMS[form])
    path = theirs.save(tmp_path / "best.pt", {"model": model})
    detector = load(path)
    assert detector.head.partition == THREE  # classes, names and weights come out
    assert difference(model, detector) < 1e-5
    half = theirs.save(tmp_path / "half.pt", {"model": copy.deepcopy(model).half()})
    assert difference(model, load(half)) < 1e-2
    fused = theirs.save(tmp_path / "fused.pt", {"model": copy.deepcopy(model).fuse()})
    assert difference(model, load(fused)) < 1e-5
    torch.save(model.state_dict(), tmp_path / "state.pt")
    assert difference(model, load(tmp_path / "state.pt", THREE)) < 1e-5
    assert detector.head.adapter == ("attention" if form == "attention" else "none")


def test_heads_of_all_classes(tmp_path):
    model = theirs.several_heads(NAMES, GROUPS, full_head=True)
    rows = [[0, 1, 2, 3, 4, *(5 + c for c in group)] for group in GROUPS]
    for tree in ({"model": model}, model):
        detector = load(theirs.save(tmp_path / "full.pt", tree))
        assert detector.head.nc == len(NAMES)
        assert difference(model, detector, rows) < 1e-5
    torch.save(model.state_dict(), tmp_path / "state.pt")
    assert difference(model, load(tmp_path / "state.pt", THREE), rows) < 1e-5
    many = [f"thing {c}" for c in range(80)]
    groups = [list(range(h, 80, 4)) for h in range(4)]
    model = theirs.several_heads(many, groups, full_head=True)
    with pytest.raises(ValueError, match="4 heads have all 80 classes each; give the head file"):
        load_foreign(model.state_dict())  # not one detector of 320 classes


def test_classes_are_found_by_name(tmp_path, single):
    path = theirs.save(tmp_path / "best.pt", {"model": single})
    turned = Partition.single(NAMES[::-1])
    with torch.no_grad():
        raws = load(path, turned)(images()), load(path)(images())
    for a, b in zip(*raws, strict=True):
        a, b = per_anchor(a, 3), per_anchor(b, 3)
        assert torch.equal(a[..., :5], b[..., :5])
        assert torch.equal(a[..., 5:].flip(-1), b[..., 5:])
    other = Partition.single([*NAMES[:-1], "pen"])
    with pytest.raises(ValueError, match="best.pt: its class 6 is 'cup', which is not a class"):
        load(path, other)
    with pytest.raises(ValueError, match=r"best.pt: has 7 classes .* not 2 \(a, b"):
        load(path, Partition.single(["a", "b"]))
    british = Partition.single([n.replace("car", "Car") for n in NAMES])
    assert load(path, british).head.partition == british
    several = theirs.several_heads(NAMES, GROUPS)
    path = theirs.save(tmp_path / "three.pt", {"model": several})
    groups = [[6 - c for c in group] for group in GROUPS]
    heads = [Head(str(h), group) for h, group in enumerate(groups)]
    detector = load(path, Partition(heads, NAMES[::-1]))
    assert [h.classes for h in detector.head.partition.heads] == list(map(sorted, groups))
    wrong = Partition([heads[1], heads[0], heads[2]], NAMES[::-1])
    with pytest.raises(ValueError, match="three.pt: its head 0 has other classes than the head"):
        load(path, wrong)


class Bottleneck(nn.Module):
    pass


def other_networks():
    "Names of tensors of other architectures, and what the message calls them."
    yield "YOLOv5", ["model.0.conv.weight", "model.2.cv1.conv.weight", "model.24.m.0.weight"]
    yield (
        "YOLOv7, but not YOLOv7-tiny",
        [
            *(f"model.{i}.conv.weight" for i in (0, 76)),
            "model.77.conv.weight",
            "model.102.rbr_dense.0.weight",
            "model.105.m.0.weight",
        ],
    )
    yield "YOLOv8", ["model.2.cv1.conv.weight", "model.22.cv2.0.0.conv.weight"]
    yield "a detector of torchvision", ["backbone.body.conv1.weight", "rpn.head.conv.weight"]
    yield "an image classifier", ["conv1.weight", "layer1.0.conv1.weight", "fc.weight"]
    yield "mhdet", list(Detector.make(Partition.single(NAMES), 0.125).state_dict())
    yield "no tensors", []
    yield "another network", ["w"]


@pytest.mark.parametrize("what, names", list(other_networks()))
def test_another_architecture_is_refused_by_name(tmp_path, what, names):
    torch.save({"model": {name: torch.ones(2, 2) for name in names}}, tmp_path / "x.pt")
    with pytest.raises(ValueError, match=f"x.pt: holds .*{what}.*fits is YOLOv7-tiny") as e:
        load(tmp_path / "x.pt")
    assert "\n" not in str(e.value)


def test_another_activation_is_refused(tmp_path):
    silu = theirs.one_head(NAMES, act=nn.SiLU())
    with pytest.raises(ValueError, match="x.pt: its activation is SiLU; what fits is YOLOv7-tiny"):
        load(theirs.save(tmp_path / "x.pt", {"model": silu}))
    assert mhdet("convert x.pt", tmp_path)[0] == 0
    with pytest.raises(ValueError, match="x.safetensors: its activation is SiLU"):
        load(tmp_path / "x.safetensors")


def test_other_wrappers(tmp_path, single):
    state = single.state_dict()
    trees = [
        nn.DataParallel(single),
        {"state_dict": {f"module.{k}": v for k, v in state.items()}},
        {"model": {f"_orig_mod.{k}": v for k, v in state.items()}},
        {"epoch": 1, "model": {"state_dict": state}},
        single.model.state_dict(),
    ]
    for tree in trees:
        detector = load(theirs.save(tmp_path / "x.pt", tree))
        assert difference(single, detector) < 1e-5


# Transfer


VOC = ["aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"]
VOC += ["diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa"]
VOC += ["train", "tvmonitor"]
IN_COCO = [4, 1, 14, 8, 39, 5, 2, 15, 56, 19, 60, 16, 17, 3, 0, 58, 18, 57, 6, 62]


def coco_names():
    return load_heads(ROOT / "data" / "heads-coco-standard.yaml").names


@pytest.mark.parametrize("several", [False, True])
def test_classes_of_coco_for_voc(tmp_path, several):
    names = coco_names()
    path = theirs.save(tmp_path / "coco.pt", {"model": theirs.one_head(names)})
    changes = dict(weights=str(path), transfer="classes", width=None)
    if several:
        heads = [Head("a", list(range(7))), Head("b", list(range(7, 20)))]
        save_heads(tmp_path / "H.yaml", Partition(heads, VOC))
        changes["heads"] = str(tmp_path / "H.yaml")
    notes = []
    model = build(load_config().override(**changes), VOC, notes=notes)
    source = load_foreign(path)
    nh = model.head.nh
    for ours, old in zip(model.head.m, source.head.m, strict=True):
        for name in ("weight", "bias"):
            a, b = (m.get_parameter(name).unflatten(0, (3, -1)) for m in (ours, old))
            for c, k in enumerate(IN_COCO):
                assert torch.equal(a[:, 5 * nh + c], b[:, 5 + k])
            for h in range(nh):
                assert torch.equal(a[:, 5 * h : 5 * h + 5], b[:, :5])
    assert notes == [f"{path}: 20 of 20 classes taken over"]
    names = [*VOC, "unicorn"]
    notes.clear()
    build(load_config().override(**changes | {"heads": None}), names, notes=notes)
    assert notes == [f"{path}: 20 of 21 classes taken over; new: unicorn"]


def test_intersect_says_what_it_took_or_refuses(tmp_path, single):
    path = theirs.save(tmp_path / "best.pt", {"model": single})
    notes = []
    cfg = load_config().override(weights=str(path), transfer="intersect")
    model = build(cfg, VOC, notes=notes)  # the width of the file
    assert model.trunk.channels == [32, 64, 128]
    assert notes == [f"{path}: 331 of 337 tensors, 100% of the trunk's parameters taken over"]
    with pytest.raises(ValueError) as e:
        build(cfg.override(width=0.5), VOC)
    assert "0% of the trunk's parameters" in str(e.value)
    assert "of another width (maps of 32/64/128 channels, not 64/128/256)" in str(e.value)
    with pytest.raises(ValueError, match=r"of another width \(maps of 32/64/128 channels, not 64"):
        build(cfg.override(width=0.5, transfer="exact"), NAMES)


def test_a_run_starts_from_attention(tmp_path):
    model = theirs.several_heads(NAMES, GROUPS, attention=True)
    path = theirs.save(tmp_path / "best.pt", {"model": model})
    save_heads(tmp_path / "H.yaml", THREE)
    cfg = load_config().override(weights=str(path), heads=str(tmp_path / "H.yaml"))
    with pytest.raises(ValueError, match="its heads have attention; give adapter=attention"):
        build(cfg, NAMES)
    assert difference(model, build(cfg.override(adapter="attention"), NAMES).eval()) < 1e-5


def test_configurations_that_carry_trust_still_open(tmp_path):
    for value in ("false", "true"):
        (tmp_path / "config.yaml").write_text(f"width: 0.5\ntrust: {value}\n")
        assert load_config(tmp_path / "config.yaml").network.width == 0.5
    with pytest.raises(KeyError, match="key 'trust' is gone: weights are opened without running"):
        load_config("trust=true")


# The command line


def mhdet(line, folder):
    code, out, err = run_line(line, folder)
    return code, out, err


def test_a_foreign_file_as_a_run(tmp_path):
    names = toy_dataset(1).names
    groups = [list(range(5)), list(range(5, len(names)))]
    model = theirs.several_heads(names, groups)
    theirs.save(tmp_path / "best.pt", {"model": model, "ema": None})
    line = "import best.pt --data toy:64 --out r imgsz=64 batch=8 workers=0 precision=fp32"
    code, out, err = mhdet(f"{line} --json", tmp_path)
    assert code == 0, err
    facts = json.loads(out)
    assert (facts["heads"], facts["classes"], facts["width"]) == (2, len(names), theirs.WIDTH)
    detector, cfg = load_run("r", tmp_path / "runs")
    assert difference(model, detector) < 1e-5
    assert [h.classes for h in detector.head.partition.heads] == groups
    assert (cfg.data.data, cfg.data.imgsz) == ("toy:64", 64)
    halves = [Head("a", [0, 1]), Head("b", [2, 3, 4]), Head("c", groups[1])]
    save_heads(tmp_path / "H.yaml", Partition(halves, names))
    for command in (
        "eval r",
        "confuse r",
        "errors r",
        "split r --heads H.yaml --out s",
        "eval s",
        "runs",
        "train data=toy:32 epochs=1 imgsz=64 batch=8 nominal_batch=8 workers=0 precision=fp32 "
        "weights=r heads=runs/r/heads.yaml run=t",
    ):
        code, out, err = mhdet(command, tmp_path)
        assert code == 0, (command, err)
    code, _, err = mhdet(line, tmp_path)
    assert (code, "runs/r: exists already" in err) == (2, True)
    code, _, err = mhdet("import best.pt --out other", tmp_path)
    assert (code, "expected --data D" in err) == (2, True)


@pytest.mark.slow
def test_an_imported_run_is_shown_and_exported(tmp_path):
    "detect and export, whose file gives what the original module gives."
    pytest.importorskip("onnx", reason="onnx is not installed")
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    data = toy_dataset(2, size=64)
    groups = [list(range(5)), list(range(5, len(data.names)))]
    model = theirs.several_heads(data.names, groups, attention=True)
    theirs.save(tmp_path / "best.pt", {"model": model, "ema": None})
    for i in (0, 1):
        Image.fromarray(data.image(i)).save(tmp_path / f"{i}.png")
    for command in (
        "import best.pt --data toy:64 --out r imgsz=64 batch=8 workers=0 precision=fp32",
        "detect r 0.png 1.png --out shown --conf .01",
        "export r --out r.onnx",
        "export r --out nms.onnx --nms --conf .01",
        "export r --out raw.onnx --raw",
    ):
        code, out, err = mhdet(command, tmp_path)
        assert code == 0, (command, err)
    assert {"0.png", "1.png"} <= {p.name for p in (tmp_path / "shown").rglob("*.png")}
    session, facts = onnx_facts(tmp_path / "raw.onnx")
    assert facts["names"] == data.names and len(facts["heads"]) == 2
    pixels = np.stack([data.image(0)]).transpose(0, 3, 1, 2)
    maps = [torch.from_numpy(m) for m in session.run(None, {"pictures": np.float32(pixels / 255)})]
    with torch.no_grad():
        original = model(torch.from_numpy(np.float32(pixels / 255)))
    for level, raw in enumerate(maps):
        outputs = per_anchor(raw, 3)
        for h, group in enumerate(groups):
            own = outputs[..., [*range(5 * h, 5 * h + 5), *(10 + c for c in group)]]
            expected = per_anchor(original[h][level], 3)
            assert (own - expected).abs().max() < 1e-4 * expected.abs().max()
    assert len(run_onnx(tmp_path / "nms.onnx", [data.image(0)]).score)


def test_convert(tmp_path, single):
    theirs.save(tmp_path / "best.pt", {"model": theirs.several_heads(NAMES, GROUPS)})
    code, out, err = mhdet("convert best.pt --json", tmp_path)
    assert code == 0, err
    facts = json.loads(out)
    assert facts["holds"] == "YOLOv7-tiny, 7 classes in 3 heads"
    a, b = read_checkpoint(tmp_path / "best.pt"), read_checkpoint(tmp_path / "best.safetensors")
    assert (a.names, a.heads) == (b.names, b.heads)
    assert all(torch.equal(a.tensors[k], v) for k, v in b.tensors.items())
    assert load(tmp_path / "best.safetensors").head.partition == THREE
    code, _, err = mhdet("convert best.pt", tmp_path)
    assert (code, "best.safetensors: exists already" in err) == (2, True)
    fused = theirs.save(tmp_path / "fused.pt", {"model": copy.deepcopy(single).fuse()})
    assert mhdet("convert fused.pt --out f.safetensors", tmp_path)[0] == 0
    assert difference(single, load(tmp_path / "f.safetensors")) < 1e-5
    assert read_checkpoint(fused).folded


def test_safetensors_of_others(tmp_path, single):
    state = {
        k: v.contiguous().half() if v.is_floating_point() else v
        for k, v in single.state_dict().items()
    }
    for metadata in (None, {"format": "pt"}, {"mhdet": "{"}, {"mhdet": '{"names": 3}'}):
        save_file(state, tmp_path / "x.safetensors", metadata)
        assert difference(single, load(tmp_path / "x.safetensors")) < 1e-2


def test_an_80_class_detector_on_data_with_fewer_classes(tmp_path):
    names = [*toy_dataset(1).names[::-1], "zebra", "cup of tea"]
    theirs.save(tmp_path / "best.pt", {"model": theirs.one_head(names)})
    line = "import best.pt --data toy:64 imgsz=64"
    code, _, err = mhdet(f"{line} --out r", tmp_path)
    assert code == 2 and f"best.pt: has {len(names)} classes" in err
    code, _, err = mhdet(f"{line} --out r transfer=classes", tmp_path)
    assert code == 0, err
    detector, source = load_run("r", tmp_path / "runs")[0], load(tmp_path / "best.pt")
    with torch.no_grad():
        few, all_of = (per_anchor(m(images())[0], 3) for m in (detector, source))
    n = len(names) - 2
    assert torch.equal(few[..., 5:], all_of[..., 5 : 5 + n].flip(-1))
    theirs.save(tmp_path / "other.pt", {"model": theirs.one_head(names[1:])})
    code, _, err = mhdet("import other.pt --data toy:64 --out o transfer=classes", tmp_path)
    assert code == 2 and f"other.pt: has no class {names[0]}, and import trains nothing" in err


@pytest.mark.parametrize("change", ["bias", "rank", "width", "classes", "narrow"])
def test_shapes_that_no_detector_has(tmp_path, single, change):
    state = dict(single.state_dict())
    changes = {
        "bias": {"model.77.m.0.bias": torch.zeros(())},
        "rank": {"model.76.conv.weight": torch.zeros(128)},
        "width": {"model.76.conv.weight": torch.zeros(500_000, 1, 1, 1)},
        "classes": {"model.77.m.0.bias": torch.zeros(9)},
        "narrow": {"model.0.conv.weight": torch.zeros(8, 3, 5, 5)},
    }
    torch.save(state | changes[change], tmp_path / "x.pt")
    with pytest.raises(ValueError, match=r"x.pt: .*(axes|classes|width|model.0.conv.weight)"):
        load(tmp_path / "x.pt")


def test_a_file_stays_open_only_while_it_is_read(tmp_path):
    torch.save({"a": torch.ones(2)}, tmp_path / "x.pt")
    with TorchFile(tmp_path / "x.pt") as file:
        stored = file.tree["a"]
    with pytest.raises(ValueError):
        file.tensor(stored)
