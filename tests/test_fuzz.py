"""Files that somebody else wrote, damaged at random.

Reading one gives the right boxes and a count of the rest, or an error of one clear line that names
the file.
"""

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
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from PIL import Image

from mhdet.core.config import Config, load_config
from mhdet.core.files import read_yaml
from mhdet.core.runs import JsonLog
from mhdet.data.coco import read_coco
from mhdet.data.records import effect_of
from mhdet.data.splits import open_data
from mhdet.data.voc import VOC, read_voc
from mhdet.data.yolo import read_yolo
from mhdet.evaluation.confusion import read_confusion
from mhdet.evaluation.foreign import read_predictions
from mhdet.evaluation.results import read_gt, read_results, read_truth
from mhdet.partition.evidence import read_counts, read_pairs
from mhdet.partition.heads import load_heads
from mhdet.partition.strategies import STANDARD, read_groups, standard

N, W, H = 40, 64, 48  # images, their size in px
NAMES = ["cat", "dog", "cow"]
nan, inf = float("nan"), float("inf")
# fmt: off
STRANGE = [
    None, True, False, 0, 1, 2, -1, 7, 1.0, 1.5, -0.5, 1e308, nan, inf, -inf, 2**63, -(10**30),
    10**400, "", " ", "x", "1", "-1", "nan", "1_0", "true", "no", "\0", "a\nb", "\u2028",
    "\ud800", "../x", "/absent", "x" * 300, [], {}, [1], [[]], {"a": 1}, {"id": 1},
    [1, 2, 3, 4], ["1", 2, 3, 4], [True, 1, 2, 3], [nan] * 4, [5, 5, 10**30, 9],
]
TOKENS = [
    "", "x", "-1", "nan", "inf", "1e400", "1_0", "0x1", "٣", "1,5", "3.7", "9" * 30,
    "9" * 5000, "yes", "~", "1 2", '"', "'", "!!python/object/apply:os.system [touch spoilt]",
    "&a [*a]", "*b", "!!int ''", "!!timestamp x", "2001-99-99", "[" * 1100, "{a: 1, a: 2}",
    "\0", "é", "<<: [1]", "? [1]", "\t", "#", "- 1", "a: b: c", "%", "@", "`",
]
BYTES = [
    b"", b"\xff", b"\xef\xbb\xbf", b"\x00", b"\r", b"\n", b" ", b'"', b",", b"-", b"9", b"e9",
    b"[", b"}", b"<", b"&", b"\xe2\x80\xa8",
]
# fmt: on


# Damage.


def one_of(draw, values):
    return values[draw(st.integers(0, len(values) - 1))]


def spot(draw, tree):
    "A container somewhere in a tree, and a key or place in it."
    while True:
        key = one_of(draw, list(tree) if isinstance(tree, dict) else range(len(tree)))
        if not isinstance(tree[key], (dict, list)) or not tree[key] or draw(st.integers(0, 4)) == 0:
            return tree, key
        tree = tree[key]


def damage_tree(draw, tree):
    "Values replaced, dropped, exchanged, doubled, keys renamed: once or twice."
    tree = copy.deepcopy(tree)
    for _ in range(draw(st.integers(1, 2))):
        if not tree:
            break
        box, key = spot(draw, tree)
        what = one_of(draw, ["value"] * 3 + ["drop", "exchange", "double", "rename"])
        if what == "drop":
            del box[key]
        elif what == "exchange":
            other, place = spot(draw, tree)
            box[key], other[place] = copy.deepcopy(other[place]), copy.deepcopy(box[key])
        elif what == "double" and isinstance(box, list):
            box.insert(key, copy.deepcopy(box[key]))
        elif what == "rename" and isinstance(box, dict):
            keys = [v for v in STRANGE if isinstance(v, (str, int, float, type(None)))]
            box[one_of(draw, keys)] = box.pop(key)
        else:
            box[key] = copy.deepcopy(one_of(draw, STRANGE))
    return tree


def damage_bytes(draw, data):
    """A few bytes flipped, cut or put in, once or twice.

    Or a mark at the start, another encoding, a piece twice, a word for another, nothing at all.
    """
    for _ in range(draw(st.integers(1, 2))):
        at, to = (draw(st.integers(0, len(data))) for _ in range(2))
        kinds = ["flip", "insert", "cut", "word", "twice", "start", "end", "utf16", "empty"]
        what = one_of(draw, kinds)
        if what == "flip" and at < len(data):
            data = data[:at] + bytes([data[at] ^ 1 << to % 8]) + data[at + 1 :]
        elif what == "insert":
            data = data[:at] + one_of(draw, BYTES) * draw(st.integers(1, 3)) + data[at:]
        elif what == "cut":
            data = data[: min(at, to)] + data[max(at, to) :]
        elif what == "word":
            words = data.split(b" ")
            words[at % len(words)] = one_of(draw, TOKENS).encode()
            data = b" ".join(words)
        elif what == "twice":
            data = data[:at] + data[min(at, to) :]
        elif what == "start":
            data = one_of(draw, BYTES) + data
        elif what == "end":
            data = data[:at]
        elif what == "utf16":
            data = data.decode("latin1").encode("utf16")
        elif what == "empty" and to == at:
            data = b""
    return data


def damaged(draw, tree, write):
    "Bytes of a file damaged in its structure, or in its bytes."
    if draw(st.booleans()):
        return damage_bytes(draw, write(tree))
    try:
        return write(damage_tree(draw, tree))
    except (UnicodeEncodeError, TypeError, yaml.YAMLError, ValueError):  # cannot even be written
        return damage_bytes(draw, write(tree))


# Judging.


def state(root):
    "Which files there are, how long each is, and when it was written and changed."
    out = {}
    for folder, _, files in os.walk(root):
        for f in files:
            file = os.path.join(folder, f)
            stat = os.stat(file)
            out[file] = (stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)
    return out


def judged(read, root):
    """What is read, or None after an error of one clear line that names a file.

    Nothing may be written, and nothing warned of.
    """
    before = state(root)
    try:
        with warnings.catch_warnings(action="error"):
            out = read()
    except (ValueError, KeyError, OSError) as e:
        words = e.args[0] if isinstance(e, KeyError) else str(e)
        assert not isinstance(e, UnicodeError), repr(e)
        one_line = "\n" not in words and len(words) < 2000
        assert str(root) in words and one_line, f"{type(e).__name__}: {words}"
        out = None
    assert state(root) == before
    assert not os.path.exists("spoilt")  # nothing in the file was executed
    return out


def many(n, damage, least=0.05):
    """Read n damaged files.

    At least a share of them must be read, and a share refused, or the test has tested nothing.
    """
    outcomes = Counter()

    # a fixed seed: under `derandomize` the cases would change with every rename in this file
    @seed(0)
    @settings(
        max_examples=n,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate],
    )
    @given(st.data())
    def run(data):
        outcomes[damage(data.draw) is not None] += 1

    run()
    assert min(outcomes[True], outcomes[False]) >= least * sum(outcomes.values()), outcomes


# What a file says, read again in the simplest way.


def number(v):
    return type(v) in (int, float) and abs(v) < 1e18  # no bool, no NaN, nothing infinite


def key(v):
    if type(v) is float and v.is_integer():
        return int(v)
    return v if type(v) in (int, str) else None


def flag(v):
    no, yes = (None, 0, "", "0", "false"), (1, "1", "true")
    return dict.fromkeys(no, False)[v] if v in no else dict.fromkeys(yes, True)[v]


def valid(x0, y0, x1, y1, w, h):
    return x1 > x0 and y1 > y0 and x0 < w and y0 < h and x1 > 0 and y1 > 0 and x1 - x0 < inf


def rows_of(records):
    "Boxes as a bag of (image, class, four numbers, ignore, crowd, area)."
    gt = records.gt
    columns = (gt["image"], gt["label"], gt["box"].tolist(), gt["ignore"], gt["crowd"], gt["area"])
    bag = Counter()
    for i, c, box, ignore, crowd, area in zip(*columns, strict=True):
        row = (bool(ignore), bool(crowd), round(float(area), 6))
        bag[(records.ids[i], records.names[c], *box, *row)] += 1
    return bag


def left_out(records):
    skipped = [v for k, v in records.problems.items() if effect_of(k) == "box skipped"]
    return sum(map(len, skipped))


def agree(records, n, true):
    "Read is what is right, and what is not read is counted."
    assert rows_of(records) == Counter(true)
    assert len(records.gt["label"]) + left_out(records) == n


# COCO.


def coco():
    rng = random.Random(0)
    images = [dict(id=k, file_name=f"{k}.png", width=W, height=H) for k in range(N)]
    notes = []
    for k in range(60):
        note = dict(id=k + 1, image_id=k % N, category_id=rng.choice([3, 5, 9]))
        note |= dict(bbox=[k % 30, 4, 20, 10.5], area=100 + k, iscrowd=int(k % 7 == 0))
        notes.append(note)
    categories = [dict(id=i, name=n) for i, n in zip((3, 5, 9), NAMES, strict=True)]
    return dict(images=images, annotations=notes, categories=categories)


def stated_size(m):
    return m.get("width") or W, m.get("height") or H


def leaves_its_image(note, images):
    "Whether a box goes past the size that is stated: then the size of the file counts."
    try:
        x, y, w, h = note["bbox"]
        width, height = stated_size(images[key(note["image_id"])])
        assert isinstance(note["bbox"], list) and all(map(number, (x, y, w, h)))
        return x < 0 or y < 0 or float(x) + w > width or float(y) + h > height
    except (AssertionError, TypeError, KeyError, ValueError, AttributeError):
        return False


def coco_truth(data):
    "The boxes that are right, of a file that could be read."
    images, names = {}, {key(c["id"]): c["name"] for c in data["categories"]}
    for m in data["images"]:
        images.setdefault(key(m["id"]), m)
    there = {f"{k}.png" for k in range(N)}
    out, notes = [], data["annotations"]
    corrected = {key(a["image_id"]) for a in notes if leaves_its_image(a, images)}
    for a in notes:
        try:
            m, name = images[key(a["image_id"])], names[key(a["category_id"])]
            b = a["bbox"]
            x, y, w, h = b if isinstance(b, list) and all(map(number, b)) else ()
            ignore = [flag(a.get("difficult")), flag(a.get("ignore"))]
            crowd = flag(a.get("iscrowd"))
            area = w * h if a.get("area") is None else a["area"]
        except (TypeError, KeyError, ValueError, AttributeError):
            continue
        known = key(a["image_id"]) is not None and key(a["category_id"]) is not None
        good = known and number(area) and area >= 0
        x, y, w, h = map(float, (x, y, w, h))
        box, size = (x, y, x + w, y + h), (W, H) if key(m["id"]) in corrected else stated_size(m)
        if good and m["file_name"] in there and valid(*box, *size):
            out.append((key(m["id"]), name, *box, any(ignore), crowd, round(float(area), 6)))
    return out


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    "Forty images, in the places where the three formats want them."
    root = tmp_path_factory.mktemp("base")
    images = ("coco/images/train", "yolo/images", "voc/JPEGImages")
    annotations = ("coco/annotations", "yolo/labels", "voc/Annotations", "voc/ImageSets/Main")
    for folder in (*images, *annotations, "files"):
        (root / folder).mkdir(parents=True)
    for k in range(N):
        Image.new("RGB", (W, H)).save(root / f"coco/images/train/{k}.png")
        Image.new("RGB", (W, H)).save(root / f"yolo/images/{k}.png")
        Image.new("RGB", (W, H)).save(root / f"voc/JPEGImages/{k}.jpg", "PNG")
    return root


def as_json(tree):
    return json.dumps(tree).encode()


def as_yaml(tree):
    return yaml.safe_dump(tree, sort_keys=False, allow_unicode=True).encode()


def test_coco(base):
    root, file, clean = base / "coco", base / "coco/annotations/instances_train.json", coco()

    def damage(draw):
        file.write_bytes(damaged(draw, clean, as_json))
        records = judged(lambda: open_data(root, dev=0)["train"], root)
        if records:
            data = json.loads(file.read_bytes())
            agree(records, len(data["annotations"]), coco_truth(data))
        return records

    many(110, damage)


def test_annotations_of_coco_are_never_an_error(base):
    root, file, clean = base / "coco", base / "coco/annotations/instances_train.json", coco()

    def damage(draw):
        data = clean | dict(annotations=damage_tree(draw, clean["annotations"]))
        try:
            file.write_bytes(as_json(data))
        except (TypeError, ValueError):
            return None
        records = judged(lambda: read_coco(file), root)
        agree(records, len(data["annotations"]), coco_truth(json.loads(file.read_bytes())))
        return records

    many(80, damage, 0)


# VOC.


def add(parent, tag, text=None):
    "A new element."
    element = ET.SubElement(parent, tag)
    element.text = text
    return element


def voc():
    trees = []
    for k in range(N):
        tree = ET.Element("annotation")
        add(tree, "filename", f"{k}.jpg")
        size = add(tree, "size")
        for tag, v in zip(("width", "height", "depth"), (W, H, 3), strict=True):
            add(size, tag, str(v))
        for j in range(k % 3):
            o = add(tree, "object")
            add(o, "name", NAMES[(k + j) % 3])
            add(o, "difficult", str(int(k % 5 == 0)))
            box = add(o, "bndbox")
            corners = (1 + j, 2, 30 + k % 9, 40)
            for tag, v in zip(("xmin", "ymin", "xmax", "ymax"), corners, strict=True):
                add(box, tag, str(v))
        trees.append(tree)
    return trees


def damage_xml(draw, tree):
    tree = copy.deepcopy(tree)
    for _ in range(draw(st.integers(1, 2))):
        inner = [(p, c) for p in tree.iter() for c in p]
        if not inner:
            break
        parent, child = one_of(draw, inner)
        _, other = one_of(draw, inner)
        text = one_of(draw, TOKENS)
        what = one_of(draw, ["text"] * 3 + ["drop", "exchange", "double", "root"])
        if what == "drop":
            parent.remove(child)
        elif what == "exchange":
            child.text, other.text = other.text, child.text
        elif what == "double":
            parent.append(copy.deepcopy(child))
        elif what == "root":
            tree.tag = one_of(draw, ["annotation", "x"])
        else:
            child.text = text
    return ET.tostring(tree)


def text_number(t):
    return float(t) if t and "_" not in t and abs(float(t)) < 1e18 else nan


def voc_truth(trees):
    "The boxes that are right, and how many there are."
    out, n = [], 0
    for k, t in trees.items():
        size = []
        for side, actual in (("width", W), ("height", H)):
            stated = (t.findtext(f"size/{side}") or "0").strip() or 0
            size.append(float(stated) or actual)
        for o in t.findall("object"):
            n += 1
            try:
                sides = ("xmin", "ymin", "xmax", "ymax")
                x0, y0, x1, y1 = (text_number(o.findtext(f"bndbox/{side}")) for side in sides)
                ignore = flag((o.findtext("difficult") or "").strip())
            except (ValueError, KeyError):
                continue
            box = x0 - 1, y0 - 1, x1, y1
            name = o.findtext("name")
            if name in NAMES and all(map(math.isfinite, box)) and valid(*box, *size):
                area = round((x1 - x0 + 1) * (y1 - y0 + 1), 6)
                out.append((k, name, *box, ignore, False, area))
    return out, n


def test_voc(base):
    root, clean = base / "voc", voc()
    listed = root / "ImageSets/Main/train.txt"

    def write(k):
        (root / f"Annotations/{k}.xml").write_bytes(ET.tostring(clean[k]))

    for k in range(N):
        write(k)
    last = [0]

    def damage(draw):
        write(last[0])
        listed.write_text("\n".join(map(str, range(N))) + "\n")
        last[0] = k = draw(st.integers(0, N - 1))
        file = root / f"Annotations/{k}.xml"
        if draw(st.integers(0, 5)) == 0:
            listed.write_bytes(damage_bytes(draw, listed.read_bytes()))
        elif draw(st.booleans()):
            file.write_bytes(damage_bytes(draw, file.read_bytes()))
        else:
            file.write_bytes(damage_xml(draw, clean[k]))
        records = judged(lambda: read_voc(root, "train", NAMES), root)
        if records:
            lines = listed.read_text("utf-8-sig", errors="replace").splitlines()
            stems = list(dict.fromkeys(line.split()[0] for line in lines if line.strip()))
            trees = {}
            for stem in stems:
                if stem in map(str, range(N)):
                    trees[stem] = ET.parse(root / f"Annotations/{stem}.xml").getroot()
            true, n = voc_truth(trees)
            agree(records, n, true)
            assert len(records.problems.get("image without XML", [])) == len(stems) - len(trees)
        return records

    many(80, damage)


# YOLO.


def yolo_box(v):
    "The box of the numbers after the class, in shares; None if they are neither box nor outline."
    if len(v) == 4:
        return v[0] - v[2] / 2, v[1] - v[3] / 2, v[0] + v[2] / 2, v[1] + v[3] / 2
    if len(v) >= 6 and len(v) % 2 == 0:
        return min(v[::2]), min(v[1::2]), max(v[::2]), max(v[1::2])
    return None


def yolo_truth(root, names):
    "The boxes that are right, and how many there are."
    out, n = [], 0
    for k in range(N):
        file = root / f"labels/{k}.txt"
        content = file.read_bytes()
        form = "utf-16" if content[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
        for line in content.decode(form, errors="replace").splitlines():
            if not line.strip():
                continue
            n += 1
            try:
                c, *v = map(text_number, line.split())
            except ValueError:
                continue
            box = yolo_box(v)
            if box is None:
                continue
            box = [x * side for x, side in zip(box, (W, H, W, H), strict=True)]
            all_finite = all(map(math.isfinite, [*v, *box]))
            if c in range(len(names)) and all_finite and valid(*box, W, H):
                area = round((box[2] - box[0]) * (box[3] - box[1]), 6)
                out.append((str(k), names[int(c)], *box, False, False, area))
    return out, n


def test_yolo(base):
    root, yml = base / "yolo", base / "yolo/data.yaml"
    clean = dict(path=".", train="images", names={0: "cat", 1: "dog", 2: "cow"})
    texts = []
    for k in range(N):
        outline = "1 .1 .1 .2 .1 .2 .4\n" * (k % 2)
        texts.append(f"{k % 3} .5 .5 .25 {0.1 + k / 100}\n{outline}")

    def write(k):
        (root / f"labels/{k}.txt").write_text(texts[k])

    for k in range(N):
        write(k)
    last = [0]

    def damage(draw):
        yml.write_bytes(as_yaml(clean))
        write(last[0])
        whole = draw(st.integers(0, 2)) == 0
        if whole:
            yml.write_bytes(damaged(draw, clean, as_yaml))
        else:
            last[0] = draw(st.integers(0, N - 1))
            file = root / f"labels/{last[0]}.txt"
            file.write_bytes(damage_bytes(draw, file.read_bytes()))
        records = judged(lambda: read_yolo(yml, "train"), root)
        if records:
            spec = yaml.safe_load(yml.read_bytes())["names"]
            names = [spec[i] for i in range(len(spec))]
            assert records.names == [str(n) for n in names]
            assert {type(n) for n in names} <= {str, int}
            true, n = yolo_truth(root, records.names)
            agree(records, n, true)
        else:
            assert whole
        return records

    many(80, damage)


# COCO results, and ground truth as the metrics read it: not one wrong entry is passed over.


def check_entries(columns, ids, cats, rows):
    "What was read of annotations or results is what they say, and they are right."
    assert len(columns["label"]) == len(rows)
    for k, a in enumerate(rows):
        x, y, w, h = a["bbox"]
        assert all(map(number, a["bbox"])) and w >= 0 and h >= 0
        assert columns["box"][k].tolist() == [x, y, float(x) + float(w), float(y) + float(h)]
        assert ids[columns["image"][k]] == key(a["image_id"])
        assert cats[columns["label"][k]] == key(a["category_id"])


def check_truth(gt, notes):
    for k, a in enumerate(notes):
        _, _, w, h = a["bbox"]
        area = w * h if a.get("area") is None else a["area"]
        assert number(area) and area >= 0 and gt["area"][k] == area
        assert gt["crowd"][k] == flag(a.get("iscrowd"))
        assert gt["ignore"][k] == (flag(a.get("difficult")) or flag(a.get("ignore")))


def test_results_and_ground_truth(base):
    root, file, clean = base / "files", base / "files/some.json", coco()
    ids, cats = list(range(N)), [3, 5, 9]
    results = []
    for n in clean["annotations"]:
        results.append({k: n[k] for k in ("image_id", "category_id", "bbox")} | dict(score=0.5))

    def damage(draw):
        truth = draw(st.booleans())
        file.write_bytes(damaged(draw, clean if truth else results, as_json))
        if truth:
            out = judged(lambda: read_gt(file), root)
        else:
            out = judged(lambda: read_results(file, ids, cats), root)
        if out is None:
            return None
        data = json.loads(file.read_bytes())
        if truth:
            names, gt, image_ids, category_ids = out
            assert image_ids == [key(m["id"]) for m in data["images"]]
            assert all(isinstance(n, str) for n in names)
            check_entries(gt, image_ids, category_ids, data["annotations"])
            check_truth(gt, data["annotations"])
        else:
            check_entries(out, ids, cats, data)
            for k, row in enumerate(data):
                assert number(row["score"]) and out["score"][k] == row["score"]
        return out

    many(90, damage)


def test_results_of_others(base):
    "Nothing that the strict reader refuses is read without a word, and nothing else changes."
    root, file, truth = base / "files", base / "files/some.json", base / "files/truth.json"
    clean = coco()
    truth.write_text(json.dumps(clean))
    source = read_truth(truth)
    results = [dict(n, score=0.5) for n in clean["annotations"]]
    wrapped = clean | dict(annotations=results)

    def damage(draw):
        file.write_bytes(damaged(draw, one_of(draw, [results, wrapped]), as_json))
        said = []

        def read():
            with warnings.catch_warnings(record=True) as lines:
                warnings.simplefilter("always")
                out = read_predictions(file, source)
            said.extend(lines)
            assert {line.category for line in lines} <= {UserWarning}  # none of NumPy's
            return out

        out = judged(read, root)
        if out is None:
            return None
        data = json.loads(file.read_bytes())
        if isinstance(data, dict):
            return out
        try:
            strict = read_results(file, source.ids, source.category_ids)
        except ValueError:
            assert said
            return out
        assert said or all((out[k] == strict[k]).all() for k in strict)
        return out

    many(120, damage)


# Tables.


def as_csv(rows):
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    for row in rows:
        cells = row if isinstance(row, list) else [row]
        writer.writerow(["" if c is None and isinstance(row, list) else c for c in cells])
    return out.getvalue().encode()


def table(file):
    text = file.read_bytes().decode("utf-8-sig")
    return [row for row in csv.reader(io.StringIO(text, newline="")) if row]


def check_counts(counts, rows):
    assert len(rows) == 4
    assert {len(r) for r in rows} == {len(rows[0])} == {len(set(rows[0]))}
    at, n = rows[0].index("name"), rows[0].index("instances")
    assert counts == [next(int(r[n]) for r in rows if r[at] == name) for name in NAMES]


def check_confusion(matrix, names, rows):
    size = len(rows) - 1
    assert [r[0] for r in rows[1:]] == rows[0][1:]
    assert names == [n for n in rows[0][1:] if n != "background"]
    assert len(set(names)) == len(names)
    assert not any("_" in c for r in rows[1:] for c in r[1:])
    assert matrix[:size, :size].tolist() == [[float(c) for c in r[1:]] for r in rows[1:]]


def test_tables(base):
    root, file = base / "files", base / "files/some.csv"
    counts = [["name", "instances", "note"]]
    for k, n in enumerate(NAMES):
        counts.append([n, str(10 * k), "a note"])
    confusion = [["", *NAMES, "background"]]
    for k, n in enumerate([*NAMES, "background"]):
        confusion.append([n, *map(str, range(k, k + 4))])

    def damage(draw):
        if draw(st.booleans()):
            file.write_bytes(damaged(draw, counts, as_csv))
            out = judged(lambda: read_counts(file, NAMES).tolist(), root)
            if out is not None:
                check_counts(out, table(file))
        else:
            file.write_bytes(damaged(draw, confusion, as_csv))
            out = judged(lambda: read_confusion(file), root)
            if out is not None:
                check_confusion(*out, table(file))
        return out

    many(80, damage)


# YAML: head files, pairs, groups, configs.


def plain(file):
    "A YAML read again; no mapping may have the same key twice."

    def mapping(loader, node):
        keys = [loader.construct_object(k, deep=True) for k, _ in node.value]
        assert len(set(keys)) == len(keys), f"a key twice was read: {keys}"
        values = [loader.construct_object(v, deep=True) for _, v in node.value]
        return dict(zip(keys, values, strict=True))

    loader = type("Loader", (yaml.SafeLoader,), {})
    loader.add_constructor("tag:yaml.org,2002:map", mapping)
    return yaml.load(file.read_bytes(), loader)


def test_head_files(base):
    root, file = base / "files", base / "files/heads.yaml"
    pets = dict(name="pets", weight=1.5, nc=2, classes=[0, 1])
    farm = dict(name="farm", weight=1.0, nc=1, classes=[2])
    assignments = dict(head_0=pets, head_1=farm)
    clean = dict(nc=3, heads=2, grouping="own", names=NAMES, head_assignments=assignments)

    def damage(draw):
        file.write_bytes(damaged(draw, clean, as_yaml))
        out = judged(lambda: load_heads(file), root)
        if out:
            spec = plain(file)["head_assignments"]
            assert len(spec) == out.nh
            for i, h in enumerate(out.heads):
                g = spec[f"head_{i}"]
                assert h.classes == sorted(g["classes"])
                assert h.weight == g.get("weight", 1.0)
                assert h.name == str(g.get("name", f"head_{i}"))
                assert type(g.get("name", "")) in (str, int) and out.weights[i] > 0
            names = plain(file).get("names")
            if names is not None:
                assert out.names == [str(names[i]) for i in range(len(names))]
        return out

    many(70, damage)


def class_name(c):
    "The name of a class that a file gives by name or number."
    assert type(c) in (str, int), f"a class {c!r} was read"
    return c if type(c) is str else NAMES[c]


def check_pairs(out, spec):
    pairs = [list(map(class_name, p)) for p in spec.get("pairs", [])]
    assert [[NAMES[c] for c in p] for p in out.pairs] == pairs
    assert [NAMES[c] for c in out.solo] == list(map(class_name, spec.get("solo", [])))


def check_groups(out, spec):
    assert {h: c for h, (_, c) in out.items()} == {str(h): c for h, c in spec["groups"].items()}
    assert all(type(w) in (int, float) and 0 < w < inf for w, _ in out.values())
    try:
        standard(NAMES, out)
    except ValueError as e:
        assert "\n" not in str(e)


def test_pairs_and_groups(base):
    root, file = base / "files", base / "files/wishes.yaml"
    pairs = dict(pairs=[["cat", "dog"], ["dog", 2]], solo=["cow"], together=[])
    groups = dict(groups=dict(pets=["cat", "dog"], farm=["cow"]), weights=dict(pets=1.2))

    def damage(draw):
        if draw(st.booleans()):
            file.write_bytes(damaged(draw, pairs, as_yaml))
            out = judged(lambda: read_pairs(file, NAMES), root)
            if out is not None:
                check_pairs(out, plain(file) or {})
        else:
            file.write_bytes(damaged(draw, groups, as_yaml))
            out = judged(lambda: read_groups(file), root)
            if out is not None:
                check_groups(out, plain(file) or {})
        return out

    many(60, damage)


def same(a, b):
    "A choice as stated, and as understood: 3 and '3' and 3.0 may be one."
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(b, dict):
        return all(same(v, a[k]) for k, v in b.items())
    if a == b or str(a) == str(b):
        return True
    if isinstance(a, bool):
        return str(b).lower() in (str(a).lower(), str(int(a))) or (
            not isinstance(b, bool) and float(b) == a
        )
    return isinstance(a, (int, float)) and not isinstance(b, bool) and float(b) == a


def finite(v):
    "Whether no number in a tree is NaN or infinite."
    if isinstance(v, (dict, list, tuple)):
        return all(map(finite, v.values() if isinstance(v, dict) else v))
    return not isinstance(v, float) or math.isfinite(v)


def test_configs(base):
    root, file = base / "files", base / "files/config.yaml"
    clean = dict(
        Config().flat(),
        epochs=10,
        stages=[dict(epochs=4, freeze="trunk"), dict(epochs=6, lr=0.01)],
        lr_parts=[1.0, [0.5, 3]],
        multi_scale=[96, 160],
    )

    def damage(draw):
        file.write_bytes(damaged(draw, clean, as_yaml))
        out = judged(lambda: load_config(file), root)
        if out:
            flat = out.flat()
            assert finite(flat)
            for k, v in (plain(file) or {}).items():
                value = flat[k.split(".")[-1]]
                assert same(value, v), (k, v, value)
        return out

    many(90, damage)


def test_words(base):
    "`key=value` of the command line."

    default = Config().flat()
    values = TOKENS + [str(v) for v in STRANGE if v != "\ud800"]
    plain_values = ["1", "2", "64", "0.5", "true", "mine"]  # most keys allow one of these

    def damage(draw):
        name = one_of(draw, sorted(default))
        kind = plain_values if draw(st.booleans()) else values
        word = f"{name}={draw(st.sampled_from(kind))}"
        if draw(st.integers(0, 3)) == 0:
            word = damage_bytes(draw, word.encode()).decode("latin1")
        try:
            out = load_config(word)
        except FileNotFoundError:
            return None  # no = was left
        except (ValueError, KeyError) as e:
            assert not isinstance(e, UnicodeError) and "\n" not in e.args[0]
            return None
        assert finite(out.flat())
        assert len([k for k, v in out.flat().items() if v != default[k]]) <= 1
        return out

    many(80, damage)


def test_logs(base):
    root, file = base / "files", base / "files/log.jsonl"
    clean = [dict(epoch=k, AP50=0.1 * k, note="a b") for k in range(5)]

    def as_lines(rows):
        return b"".join(as_json(r) + b"\n" for r in rows)

    def damage(draw):
        file.write_bytes(damaged(draw, clean, as_lines))
        out = judged(JsonLog(file).rows, root)
        if out is not None:
            lines = file.read_bytes().split(b"\n")
            filled = [t for t in lines if t]
            if len(out) < len(filled):  # the last line was cut off
                filled = [t for t in lines[:-1] if t]
            assert all(isinstance(r, dict) for r in out)
            assert repr(out) == repr([json.loads(t) for t in filled])
        return out

    many(60, damage)


def test_clean_files_are_read(base):
    "The files before they are damaged can be read."
    file = base / "coco/annotations/instances_train.json"
    file.write_bytes(as_json(coco()))
    agree(read_coco(file), 60, coco_truth(coco()))
    assert read_yaml(file)["categories"][0]["name"] == "cat"
    assert set(NAMES) <= set(VOC) | {"cow"} and len(STANDARD) == 4
