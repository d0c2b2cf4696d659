"""Files of others, spoilt at random: one clear line that names the file, or the right boxes and a count of the rest."""
import copy
import csv
import io
import json
import math
import os
import random
import warnings
import xml.etree.ElementTree as ET
from collections import Counter

import pytest
import yaml
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from PIL import Image

from mhdet.core.config import Config, load_config
from mhdet.core.runs import JsonLog
from mhdet.core.files import read_yaml
from mhdet.data.readers import VOC, read_coco, read_voc, read_yolo
from mhdet.data.splits import open_data
from mhdet.partition.strategies import STANDARD, read_groups, standard
from mhdet.partition.heads import load_heads
from mhdet.partition.evidence import read_counts, read_pairs
from mhdet.evaluation.confusion import read_confusion
from mhdet.evaluation.results import read_gt, read_results

N, W, H = 40, 64, 48                                  # pictures, their size
NAMES = ["cat", "dog", "cow"]
nan, inf = float("nan"), float("inf")
STRANGE = [None, True, False, 0, 1, 2, -1, 7, 1.0, 1.5, -.5, 1e308, nan, inf, -inf, 2 ** 63, -10 ** 30, 10 ** 400, "", " ", "x",
           "1", "-1", "nan", "1_0", "true", "no", "\0", "a\nb", "\u2028", "\ud800", "../x", "/absent", "x" * 300, [], {}, [1], [[]],
           {"a": 1}, {"id": 1}, [1, 2, 3, 4], ["1", 2, 3, 4], [True, 1, 2, 3], [nan] * 4, [5, 5, 10 ** 30, 9]]
TOKENS = ["", "x", "-1", "nan", "inf", "1e400", "1_0", "0x1", "٣", "1,5", "3.7", "9" * 30, "9" * 5000, "yes", "~", "1 2", '"', "'",
          "!!python/object/apply:os.system [touch spoilt]", "&a [*a]", "*b", "!!int ''", "!!timestamp x", "2001-99-99", "[" * 1100,
          "{a: 1, a: 2}", "\0", "é", "<<: [1]", "? [1]", "\t", "#", "- 1", "a: b: c", "%", "@", "`"]
BYTES = [b"", b"\xff", b"\xef\xbb\xbf", b"\x00", b"\r", b"\n", b" ", b'"', b",", b"-", b"9", b"e9", b"[", b"}", b"<", b"&", b"\xe2\x80\xa8"]


# Spoiling.

def one_of(draw, values): return values[draw(st.integers(0, len(values) - 1))]

def spot(draw, tree):
    "A container somewhere in a tree, and a key or place in it."
    while True:
        key = one_of(draw, list(tree) if isinstance(tree, dict) else range(len(tree)))
        if not isinstance(tree[key], (dict, list)) or not tree[key] or draw(st.integers(0, 4)) == 0: return tree, key
        tree = tree[key]

def spoil_tree(draw, tree):
    "Values replaced, dropped, exchanged, doubled, keys renamed: once or twice."
    tree = copy.deepcopy(tree)
    for _ in range(draw(st.integers(1, 2))):
        if not tree: break
        (box, key), what = spot(draw, tree), one_of(draw, ["value"] * 3 + ["drop", "exchange", "double", "rename"])
        if what == "drop": del box[key]
        elif what == "exchange":
            other, place = spot(draw, tree)
            box[key], other[place] = copy.deepcopy(other[place]), copy.deepcopy(box[key])
        elif what == "double" and isinstance(box, list): box.insert(key, copy.deepcopy(box[key]))
        elif what == "rename" and isinstance(box, dict):
            box[one_of(draw, [v for v in STRANGE if isinstance(v, (str, int, float, type(None)))])] = box.pop(key)
        else: box[key] = copy.deepcopy(one_of(draw, STRANGE))
    return tree

def spoil_bytes(draw, data):
    "A few bytes flipped, cut, put in; a mark at the start, another encoding, a piece twice, a word for another, nothing."
    for _ in range(draw(st.integers(1, 2))):
        at, to = (draw(st.integers(0, len(data))) for _ in range(2))
        what = one_of(draw, ["flip", "insert", "cut", "word", "twice", "start", "end", "utf16", "empty"])
        if what == "flip" and at < len(data): data = data[:at] + bytes([data[at] ^ 1 << to % 8]) + data[at + 1:]
        elif what == "insert": data = data[:at] + one_of(draw, BYTES) * draw(st.integers(1, 3)) + data[at:]
        elif what == "cut": data = data[:min(at, to)] + data[max(at, to):]
        elif what == "word":
            words = data.split(b" ")
            words[at % len(words)] = one_of(draw, TOKENS).encode()
            data = b" ".join(words)
        elif what == "twice": data = data[:at] + data[min(at, to):]
        elif what == "start": data = one_of(draw, BYTES) + data
        elif what == "end": data = data[:at]
        elif what == "utf16": data = data.decode("latin1").encode("utf16")
        elif what == "empty" and to == at: data = b""
    return data

def spoilt(draw, tree, write):
    "Bytes of a file spoilt in its structure, or in its bytes."
    if draw(st.booleans()): return spoil_bytes(draw, write(tree))
    try: return write(spoil_tree(draw, tree))
    except (UnicodeEncodeError, TypeError, yaml.YAMLError, ValueError):                  # cannot even be written
        return spoil_bytes(draw, write(tree))


# Judging.

def state(root):
    "Which files there are, how long each is, and when it was written and changed."
    stats = ((os.path.join(folder, f), os.stat(os.path.join(folder, f))) for folder, _, files in os.walk(root) for f in files)
    return {f: (s.st_size, s.st_mtime_ns, s.st_ctime_ns) for f, s in stats}

def judged(read, root):
    "What is read, or None after an error of one clear line that names a file; nothing may be written, nothing warned of."
    before = state(root)
    try:
        with warnings.catch_warnings(action="error"): out = read()
    except (ValueError, KeyError, OSError) as e:
        words = e.args[0] if isinstance(e, KeyError) else str(e)
        assert not isinstance(e, UnicodeError), repr(e)
        assert str(root) in words and "\n" not in words and len(words) < 2000, f"{type(e).__name__}: {words}"
        out = None
    assert state(root) == before and not os.path.exists("spoilt")
    return out

def many(n, spoil, least=.05):
    "n spoilt files; at least a share of them must be read, and a share refused, or the test has tested nothing."
    found = Counter()
    @settings(max_examples=n, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck),
              phases=[Phase.generate])
    @given(st.data())
    def run(data): found[spoil(data.draw) is not None] += 1
    run()
    assert min(found[True], found[False]) >= least * sum(found.values()), found


# What a file says, read again in the simplest way.

def number(v): return type(v) in (int, float) and abs(v) < 1e18                  # no bool, no NaN, nothing infinite
def key(v): return v if type(v) in (int, str) else int(v) if type(v) is float and v.is_integer() else None
def flag(v): return {None: False, 0: False, 1: True, "": False, "0": False, "1": True, "false": False, "true": True}[v]
def valid(x0, y0, x1, y1, w, h): return x1 > x0 and y1 > y0 and x0 < w and y0 < h and x1 > 0 and y1 > 0 and x1 - x0 < inf

def rows_of(records):
    "Boxes as a bag of (picture, class, four numbers, ignore, crowd, area)."
    gt = records.gt
    columns = (gt["image"], gt["label"], gt["box"].tolist(), gt["ignore"], gt["crowd"], gt["area"])
    return Counter((records.ids[i], records.names[c], *b, bool(d), bool(k), round(float(a), 6)) for i, c, b, d, k, a in zip(*columns))

PICTURES = {"image without file", "unreadable image", "image listed twice", "image without XML"}
def left_out(records): return sum(len(v) for k, v in records.problems.items() if k not in PICTURES)

def agree(records, n, true):
    "Read is what is right, and what is not read is counted."
    assert rows_of(records) == Counter(true)
    assert len(records.gt["label"]) + left_out(records) == n


# COCO.

def coco():
    rng = random.Random(0)
    notes = [dict(id=k + 1, image_id=k % N, category_id=rng.choice([3, 5, 9]), bbox=[k % 30, 4, 20, 10.5], area=100 + k, iscrowd=k % 7 == 0)
             for k in range(60)]
    return dict(images=[dict(id=k, file_name=f"{k}.png", width=W, height=H) for k in range(N)],
                annotations=[n | dict(iscrowd=int(n["iscrowd"])) for n in notes],
                categories=[dict(id=i, name=n) for i, n in zip((3, 5, 9), NAMES)])

def coco_truth(data):
    "The boxes that are right, of a file that could be read."
    pictures, names = {}, {key(c["id"]): c["name"] for c in data["categories"]}
    for m in data["images"]: pictures.setdefault(key(m["id"]), m)
    there = {f"{k}.png" for k in range(N)}
    out = []
    for a in data["annotations"]:
        try:
            m, name, b = pictures[key(a["image_id"])], names[key(a["category_id"])], a["bbox"]
            x, y, w, h = b if isinstance(b, list) and all(map(number, b)) else ()
            ignore, crowd = [flag(a.get("difficult")), flag(a.get("ignore"))], flag(a.get("iscrowd"))
            area = w * h if a.get("area") is None else a["area"]
        except (TypeError, KeyError, ValueError, AttributeError): continue
        good = number(area) and area >= 0 and key(a["image_id"]) is not None and key(a["category_id"]) is not None
        x, y, w, h = map(float, (x, y, w, h))
        box, size = (x, y, x + w, y + h), (m.get("width") or W, m.get("height") or H)
        if good and m["file_name"] in there and valid(*box, *size):
            out.append((key(m["id"]), name, *box, any(ignore), crowd, round(float(area), 6)))
    return out


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    "Forty pictures, in the places where the three formats want them."
    root = tmp_path_factory.mktemp("base")
    for folder in ("coco/images/train", "yolo/images", "voc/JPEGImages"): (root / folder).mkdir(parents=True)
    for folder in ("coco/annotations", "yolo/labels", "voc/Annotations", "voc/ImageSets/Main", "files"): (root / folder).mkdir(parents=True)
    for k in range(N):
        Image.new("RGB", (W, H)).save(root / f"coco/images/train/{k}.png")
        Image.new("RGB", (W, H)).save(root / f"yolo/images/{k}.png")
        Image.new("RGB", (W, H)).save(root / f"voc/JPEGImages/{k}.jpg", "PNG")
    return root


def as_json(tree): return json.dumps(tree).encode()
def as_yaml(tree): return yaml.safe_dump(tree, sort_keys=False, allow_unicode=True).encode()


def test_coco(base):
    root, file, clean = base / "coco", base / "coco/annotations/instances_train.json", coco()
    def spoil(draw):
        file.write_bytes(spoilt(draw, clean, as_json))
        records = judged(lambda: open_data(root, dev=0)["train"], root)
        if records:
            data = json.loads(file.read_bytes())
            agree(records, len(data["annotations"]), coco_truth(data))
        return records
    many(110, spoil)


def test_annotations_of_coco_are_never_an_error(base):
    root, file, clean = base / "coco", base / "coco/annotations/instances_train.json", coco()
    def spoil(draw):
        data = clean | dict(annotations=spoil_tree(draw, clean["annotations"]))
        try: file.write_bytes(as_json(data))
        except (TypeError, ValueError): return None
        records = judged(lambda: read_coco(file), root)
        agree(records, len(data["annotations"]), coco_truth(json.loads(file.read_bytes())))
        return records
    many(80, spoil, 0)


# VOC.

def voc():
    trees = []
    for k in range(N):
        t = ET.Element("annotation")
        ET.SubElement(t, "filename").text = f"{k}.jpg"
        for tag, v in zip(("width", "height", "depth"), (W, H, 3)):
            ET.SubElement(t.find("size") if t.find("size") is not None else ET.SubElement(t, "size"), tag).text = str(v)
        for j in range(k % 3):
            o = ET.SubElement(t, "object")
            ET.SubElement(o, "name").text, ET.SubElement(o, "difficult").text = NAMES[(k + j) % 3], str(int(k % 5 == 0))
            box = ET.SubElement(o, "bndbox")
            for tag, v in zip(("xmin", "ymin", "xmax", "ymax"), (1 + j, 2, 30 + k % 9, 40)): ET.SubElement(box, tag).text = str(v)
        trees.append(t)
    return trees

def spoil_xml(draw, tree):
    tree = copy.deepcopy(tree)
    for _ in range(draw(st.integers(1, 2))):
        inner = [(p, c) for p in tree.iter() for c in p]
        if not inner: break
        (parent, child), (other, text) = one_of(draw, inner), (one_of(draw, inner)[1], one_of(draw, TOKENS))
        what = one_of(draw, ["text"] * 3 + ["drop", "exchange", "double", "root"])
        if what == "drop": parent.remove(child)
        elif what == "exchange": child.text, other.text = other.text, child.text
        elif what == "double": parent.append(copy.deepcopy(child))
        elif what == "root": tree.tag = one_of(draw, ["annotation", "x"])
        else: child.text = text
    return ET.tostring(tree)

def text_number(t): return float(t) if t and "_" not in t and abs(float(t)) < 1e18 else nan

def voc_truth(trees):
    out, n = [], 0
    for k, t in trees.items():
        size = [float((t.findtext(f"size/{s}") or "0").strip() or 0) or d for s, d in (("width", W), ("height", H))]
        for o in t.findall("object"):
            n += 1
            try:
                x0, y0, x1, y1 = (text_number(o.findtext(f"bndbox/{c}")) for c in ("xmin", "ymin", "xmax", "ymax"))
                ignore = flag((o.findtext("difficult") or "").strip())
            except (ValueError, KeyError): continue
            box = x0 - 1, y0 - 1, x1, y1
            name = o.findtext("name")
            if name in NAMES and all(map(math.isfinite, box)) and valid(*box, *size):
                out.append((k, name, *box, ignore, False, round((x1 - x0 + 1) * (y1 - y0 + 1), 6)))
    return out, n


def test_voc(base):
    root, clean = base / "voc", voc()
    listed = root / "ImageSets/Main/train.txt"
    def write(k): (root / f"Annotations/{k}.xml").write_bytes(ET.tostring(clean[k]))
    for k in range(N): write(k)
    last = [0]
    def spoil(draw):
        write(last[0])
        listed.write_text("\n".join(map(str, range(N))) + "\n")
        last[0] = k = draw(st.integers(0, N - 1))
        file = root / f"Annotations/{k}.xml"
        if draw(st.integers(0, 5)) == 0: listed.write_bytes(spoil_bytes(draw, listed.read_bytes()))
        elif draw(st.booleans()): file.write_bytes(spoil_bytes(draw, file.read_bytes()))
        else: file.write_bytes(spoil_xml(draw, clean[k]))
        records = judged(lambda: read_voc(root, "train", NAMES), root)
        if records:
            stems = list(dict.fromkeys(s.split()[0] for s in listed.read_text("utf-8-sig", errors="replace").splitlines() if s.strip()))
            trees = {s: ET.parse(root / f"Annotations/{s}.xml").getroot() for s in stems if s in map(str, range(N))}
            true, n = voc_truth(trees)
            agree(records, n, true)
            assert len(records.problems.get("image without XML", [])) == len(stems) - len(trees)
        return records
    many(80, spoil)


# YOLO.

def yolo_truth(root, names):
    out, n = [], 0
    for k in range(N):
        file = root / f"labels/{k}.txt"
        for line in file.read_text("utf-8-sig", errors="replace").splitlines():
            if not line.strip(): continue
            n += 1
            try: c, *v = map(text_number, line.split())
            except ValueError: continue
            if len(v) == 4: b = v[0] - v[2] / 2, v[1] - v[3] / 2, v[0] + v[2] / 2, v[1] + v[3] / 2
            elif len(v) >= 6 and len(v) % 2 == 0: b = min(v[::2]), min(v[1::2]), max(v[::2]), max(v[1::2])
            else: continue
            b = [x * s for x, s in zip(b, (W, H, W, H))]
            if c in range(len(names)) and all(map(math.isfinite, v)) and all(map(math.isfinite, b)) and valid(*b, W, H):
                out.append((str(k), names[int(c)], *b, False, False, round((b[2] - b[0]) * (b[3] - b[1]), 6)))
    return out, n


def test_yolo(base):
    root, yml = base / "yolo", base / "yolo/data.yaml"
    clean = dict(path=".", train="images", names={0: "cat", 1: "dog", 2: "cow"})
    texts = [f"{k % 3} .5 .5 .25 {.1 + k / 100}\n" + "1 .1 .1 .2 .1 .2 .4\n" * (k % 2) for k in range(N)]
    def write(k): (root / f"labels/{k}.txt").write_text(texts[k])
    for k in range(N): write(k)
    last = [0]
    def spoil(draw):
        yml.write_bytes(as_yaml(clean)), write(last[0])
        if whole := draw(st.integers(0, 2)) == 0: yml.write_bytes(spoilt(draw, clean, as_yaml))
        else:
            last[0] = draw(st.integers(0, N - 1))
            file = root / f"labels/{last[0]}.txt"
            file.write_bytes(spoil_bytes(draw, file.read_bytes()))
        records = judged(lambda: read_yolo(yml, "train"), root)
        if records:
            spec = yaml.safe_load(yml.read_bytes())["names"]
            names = [spec[i] for i in range(len(spec))]
            assert records.names == [str(n) for n in names] and not any(isinstance(n, (bool, float, list, dict, type(None))) for n in names)
            true, n = yolo_truth(root, records.names)
            agree(records, n, true)
        else: assert whole
        return records
    many(80, spoil)


# COCO results, and ground truth as the metrics read it: not one wrong entry is passed over.

def test_results_and_ground_truth(base):
    root, file, clean = base / "files", base / "files/some.json", coco()
    ids, cats = list(range(N)), [3, 5, 9]
    results = [dict(image_id=n["image_id"], category_id=n["category_id"], bbox=n["bbox"], score=.5) for n in clean["annotations"]]
    def spoil(draw):
        truth = draw(st.booleans())
        file.write_bytes(spoilt(draw, clean if truth else results, as_json))
        out = judged(lambda: read_gt(file) if truth else (NAMES, read_results(file, ids, cats), ids, cats), root)
        if out:
            names, found, seen, known = out
            data = json.loads(file.read_bytes())
            notes = data["annotations"] if truth else data
            assert seen == ([key(m["id"]) for m in data["images"]] if truth else ids)
            assert all(isinstance(n, str) for n in names)
            assert len(found["label"]) == len(notes)
            for k, a in enumerate(notes):
                x, y, w, h = a["bbox"]
                assert all(map(number, a["bbox"])) and w >= 0 and h >= 0
                assert found["box"][k].tolist() == [x, y, float(x) + float(w), float(y) + float(h)]
                assert seen[found["image"][k]] == key(a["image_id"]) and known[found["label"][k]] == key(a["category_id"])
                if truth:
                    assert found["crowd"][k] == flag(a.get("iscrowd"))
                    assert found["ignore"][k] == (flag(a.get("difficult")) or flag(a.get("ignore")))
                    area = w * h if a.get("area") is None else a["area"]
                    assert number(area) and area >= 0 and found["area"][k] == area
                else: assert number(a["score"]) and found["score"][k] == a["score"]
        return out
    many(90, spoil)


# Tables.

def as_csv(rows):
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows([["" if c is None else c for c in r] if isinstance(r, list) else [r] for r in rows])
    return out.getvalue().encode()

def table(file): return [r for r in csv.reader(io.StringIO(file.read_bytes().decode("utf-8-sig"), newline="")) if r]


def test_tables(base):
    root, file = base / "files", base / "files/some.csv"
    counts = [["name", "instances", "note"], *([n, str(10 * k), "a note"] for k, n in enumerate(NAMES))]
    confusion = [["", *NAMES, "background"], *([n, *map(str, range(k, k + 4))] for k, n in enumerate([*NAMES, "background"]))]
    def spoil(draw):
        kind = draw(st.booleans())
        file.write_bytes(spoilt(draw, counts if kind else confusion, as_csv))
        out = judged(lambda: read_counts(file, NAMES).tolist() if kind else read_confusion(file), root)
        if out is None: return None
        rows = table(file)
        if kind:
            assert len(rows) == 4 and {len(r) for r in rows} == {len(rows[0])} and len(set(rows[0])) == len(rows[0])
            at, n = rows[0].index("name"), rows[0].index("instances")
            assert out == [next(int(r[n]) for r in rows if r[at] == name) for name in NAMES]
        else:
            matrix, names = out
            assert [r[0] for r in rows[1:]] == rows[0][1:] and names == [n for n in rows[0][1:] if n != "background"]
            assert len(set(names)) == len(names) and not any("_" in c for r in rows[1:] for c in r[1:])
            assert matrix[:len(rows) - 1, :len(rows) - 1].tolist() == [[float(c) for c in r[1:]] for r in rows[1:]]
        return out
    many(80, spoil)


# YAML: head files, wishes, groups, configs.

def plain(file):
    "A YAML read again; None if two keys of a mapping are alike, which is nobody's wish."
    def mapping(loader, node):
        keys = [loader.construct_object(k, deep=True) for k, _ in node.value]
        assert len(set(keys)) == len(keys), f"a key twice was read: {keys}"
        return dict(zip(keys, (loader.construct_object(v, deep=True) for _, v in node.value)))
    loader = type("Loader", (yaml.SafeLoader,), {})
    loader.add_constructor("tag:yaml.org,2002:map", mapping)
    return yaml.load(file.read_bytes(), loader)


def test_head_files(base):
    root, file = base / "files", base / "files/heads.yaml"
    clean = dict(nc=3, heads=2, grouping="own", names=NAMES, head_assignments=dict(
        head_0=dict(name="pets", weight=1.5, nc=2, classes=[0, 1]), head_1=dict(name="farm", weight=1., nc=1, classes=[2])))
    def spoil(draw):
        file.write_bytes(spoilt(draw, clean, as_yaml))
        out = judged(lambda: load_heads(file), root)
        if out:
            spec = plain(file)["head_assignments"]
            assert len(spec) == out.nh
            for i, h in enumerate(out.heads):
                g = spec[f"head_{i}"]
                assert h.classes == sorted(g["classes"]) and h.weight == g.get("weight", 1.) and h.name == str(g.get("name", f"head_{i}"))
                assert type(g.get("name", "")) in (str, int) and out.weights[i] > 0
            names = plain(file).get("names")
            if names is not None: assert out.names == [str(names[i]) for i in range(len(names))]
        return out
    many(70, spoil)


def test_wishes_and_groups(base):
    root, file = base / "files", base / "files/wishes.yaml"
    wishes = dict(pairs=[["cat", "dog"], ["dog", 2]], solo=["cow"], together=[])
    groups = dict(groups=dict(pets=["cat", "dog"], farm=["cow"]), weights=dict(pets=1.2))
    def spoil(draw):
        kind = draw(st.booleans())
        file.write_bytes(spoilt(draw, wishes if kind else groups, as_yaml))
        out = judged(lambda: read_pairs(file, NAMES) if kind else read_groups(file), root)
        if out is None: return None
        spec = plain(file) or {}
        name = lambda c: c if type(c) is str else NAMES[c] if type(c) is int else pytest.fail(f"a class {c!r} was read")
        if kind:
            assert [[NAMES[c] for c in p] for p in out.pairs] == [list(map(name, p)) for p in spec.get("pairs", [])]
            assert [NAMES[c] for c in out.solo] == list(map(name, spec.get("solo", [])))
        else:
            assert {h: c for h, (_, c) in out.items()} == {str(h): c for h, c in spec["groups"].items()}
            assert all(type(w) in (int, float) and 0 < w < inf for w, _ in out.values())
            try: standard(NAMES, out)
            except ValueError as e: assert "\n" not in str(e)
        return out
    many(60, spoil)


def same(a, b):
    "A choice as stated, and as understood: 3 and '3' and 3.0 may be one."
    if isinstance(a, list | tuple): return len(a) == len(b) and all(map(same, a, b))
    if isinstance(b, dict): return all(same(v, a[k]) for k, v in b.items())
    return a == b or (isinstance(a, bool) and str(b).lower() in (str(a).lower(), str(int(a)))) or \
        (isinstance(a, (int, float)) and not isinstance(b, bool) and float(b) == a) or str(a) == str(b)


def finite(v): return all(map(finite, v.values() if isinstance(v, dict) else v)) if isinstance(v, (dict, list, tuple)) \
    else not isinstance(v, float) or math.isfinite(v)


def test_configs(base):
    root, file = base / "files", base / "files/config.yaml"
    clean = dict(Config().flat(), epochs=10, stages=[dict(epochs=4, freeze="trunk"), dict(epochs=6, lr=.01)], lr_parts=[1., [.5, 3]],
                 multi_scale=[96, 160])
    def spoil(draw):
        file.write_bytes(spoilt(draw, clean, as_yaml))
        out = judged(lambda: load_config(file), root)
        if out:
            flat = out.flat()
            assert finite(flat)
            for k, v in (plain(file) or {}).items(): assert same(flat[k.split(".")[-1]], v), (k, v, flat[k.split(".")[-1]])
        return out
    many(90, spoil)


def test_words(base):
    "`key=value` of the command line."
    def spoil(draw):
        word = one_of(draw, sorted(Config().flat())) + "=" + draw(st.sampled_from(TOKENS + [str(v) for v in STRANGE if v != "\ud800"]))
        if draw(st.integers(0, 3)) == 0: word = spoil_bytes(draw, word.encode()).decode("latin1")
        try: out = load_config(word)
        except FileNotFoundError: return None                                       # no = was left
        except (ValueError, KeyError) as e:
            assert not isinstance(e, UnicodeError) and "\n" not in e.args[0]
            return None
        assert finite(out.flat()) and len([k for k, v in out.flat().items() if v != Config().flat()[k]]) <= 1
        return out
    many(80, spoil)


def test_logs(base):
    root, file = base / "files", base / "files/log.jsonl"
    clean = [dict(epoch=k, AP50=.1 * k, note="a b") for k in range(5)]
    def spoil(draw):
        file.write_bytes(spoilt(draw, clean, lambda rows: b"".join(as_json(r) + b"\n" for r in rows)))
        out = judged(JsonLog(file).rows, root)
        if out is not None:
            lines = file.read_bytes().split(b"\n")
            whole = lines[:-1] if len(out) < len([t for t in lines if t]) else [t for t in lines if t]
            assert all(isinstance(r, dict) for r in out) and repr(out) == repr([json.loads(t) for t in whole if t])
        return out
    many(60, spoil)


def test_clean_files_are_read(base):
    "The files before they are spoilt."
    file = base / "coco/annotations/instances_train.json"
    file.write_bytes(as_json(coco()))
    agree(read_coco(file), 60, coco_truth(coco()))
    assert read_yaml(file)["categories"][0]["name"] == "cat"
    assert set(NAMES) <= set(VOC) | {"cow"} and len(STANDARD) == 4
