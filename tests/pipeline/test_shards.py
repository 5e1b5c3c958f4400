"""Writing shards: the same bytes on any number of processes and after any interruption. Verifying: all damage named."""

import csv
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

from pipeline import shards
from pipeline.data.index import load_index, load_records
from pipeline.data.parallel import check_stop, in_processes
from pipeline.data.tar import parse_tar
from pipeline.errors import UserError
from tests.conftest import ROOT, SMALL, train


@pytest.fixture
def command(monkeypatch, capsys):
    """Runs `python -m pipeline.shards WORDS` in this process: (exit code, output)."""

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["shards", *map(str, words)])
        code = shards.main()
        printed = capsys.readouterr()
        return code, printed.out + printed.err

    return run


@pytest.fixture(scope="session")
def scans(tmp_path_factory):
    """An image folder: 100 real scans of digits, one sub-folder a class."""
    from sklearn.datasets import load_digits

    folder = tmp_path_factory.mktemp("scans")
    images, labels = load_digits(return_X_y=True)
    for number, (image, label) in enumerate(zip(images[:100], labels, strict=False)):
        (folder / str(label)).mkdir(exist_ok=True)
        pixels = (image.reshape(8, 8) * 255 / 16).round().astype(np.uint8)
        Image.fromarray(pixels).save(folder / str(label) / f"{number:03d}.png")
    return folder


@pytest.fixture(scope="session")
def photos(tmp_path_factory):
    """An image folder: crops of two real photographs, of several sizes, as JPEG with upper-case endings."""
    from sklearn.datasets import load_sample_images

    folder = tmp_path_factory.mktemp("photos")
    for name, photo in zip(("china", "flower"), load_sample_images().images, strict=True):
        (folder / name).mkdir()
        for number in range(4):
            Image.fromarray(photo[: 60 + 60 * number, : 100 + 60 * number]).save(folder / name / f"{number}.JPEG")
    return folder


@pytest.fixture
def written(scans, tmp_path, command):
    """Five shards of 20 scans each."""
    code, output = command("write", scans, tmp_path / "data", "--samples-per-shard", 20, "--processes", 2)
    assert code == 0, output
    return tmp_path / "data"


def samples_of(folder):
    """All samples in order."""
    return [s for path in sorted(folder.glob("*.tar")) for s in parse_tar(path.read_bytes(), str(path))]


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if ".lease-" not in path.name}


def test_a_folder_becomes_shards_that_hold_each_image_once_with_its_class(scans, written):
    classes = json.loads((written / "classes.json").read_text())
    assert classes == [str(digit) for digit in range(10)]
    samples = samples_of(written)
    found = sorted((classes[int(s["cls"])], s["png"]) for s in samples)
    assert found == sorted((path.parent.name, path.read_bytes()) for path in scans.glob("*/*"))
    assert [s["__key__"] for s in samples] == [f"train-{number:08d}" for number in range(100)]
    assert [s["cls"] for s in samples] != sorted(s["cls"] for s in samples), "not shuffled"
    assert load_index(f"{written}/train-{{000000..000004}}.tar").counts.tolist() == [20] * 5


@pytest.mark.parametrize("words", [[], ["--resize", 50, "--json", "--no-shuffle"], ["--bytes-per-shard", "20KB"]])
def test_shards_are_the_same_bytes_on_any_number_of_processes(photos, tmp_path, command, words):
    for processes in (1, 3):
        words_now = ["--processes", processes, *(words or ["--samples-per-shard", 3])]
        code, output = command("write", photos, tmp_path / str(processes), *words_now)
        assert code == 0, output
    assert contents(tmp_path / "1") == contents(tmp_path / "3")


def test_seeds_differ_and_no_shuffle_keeps_the_order(scans, tmp_path, command):
    for name, words in (("0", []), ("1", ["--seed", 1]), ("none", ["--no-shuffle"])):
        assert command("write", scans, tmp_path / name, *words)[0] == 0
    images = {name: [s["png"] for s in samples_of(tmp_path / name)] for name in ("0", "1", "none")}
    assert images["0"] != images["1"]
    assert sorted(images["0"]) == sorted(images["1"])
    assert images["none"] == [path.read_bytes() for path in sorted(scans.glob("*/*"))]


def test_resize_scales_the_short_side_down_and_never_up(photos, tmp_path, command):
    code, output = command("write", photos, tmp_path / "out", "--resize", 100, "--no-shuffle", "--json")
    assert code == 0, output
    for sample in samples_of(tmp_path / "out"):
        original = photos / json.loads(sample["json"])["source"]
        with Image.open(original) as image:
            width, height = image.size
        if height <= 100:
            assert sample["jpeg"] == original.read_bytes()
        else:
            with Image.open(io.BytesIO(sample["jpg"])) as image:
                assert image.size == (round(width * 100 / height), 100)
                with Image.open(original) as full:
                    small = full.convert("RGB").resize(image.size, Image.Resampling.LANCZOS)
                difference = np.abs(np.asarray(image, dtype=float) - np.asarray(small, dtype=float)).mean()
            assert difference < 4, "another image, or aliased"


def write_list(scans, path, label_of):
    rows = [(os.path.relpath(image, path.parent), label_of(image)) for image in sorted(scans.glob("*/*"))]
    if path.suffix == ".csv":
        with open(path, "w", newline="") as file:
            csv.writer(file).writerows([("file", "class"), *rows])
    else:
        parquet = pytest.importorskip("pyarrow.parquet")
        from pyarrow import table

        files, labels = zip(*rows, strict=True)
        parquet.write_table(table({"file": files, "class": labels}), path)


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_a_list_gives_the_same_shards_as_the_folder(scans, written, tmp_path, command, kind):
    write_list(scans, tmp_path / f"names.{kind}", lambda image: f"n{image.parent.name}")
    write_list(scans, tmp_path / f"numbers.{kind}", lambda image: int(image.parent.name))
    expected = {name: data for name, data in contents(written).items() if name.endswith(".tar")}
    for name in ("names", "numbers"):
        words = ["--samples-per-shard", 20, "--path-column", "file", "--label-column", "class"]
        code, output = command("write", tmp_path / f"{name}.{kind}", tmp_path / name, *words)
        assert code == 0, output
        assert {n: data for n, data in contents(tmp_path / name).items() if n.endswith(".tar")} == expected
    assert json.loads((tmp_path / "names/classes.json").read_text()) == [f"n{digit}" for digit in range(10)]
    assert not (tmp_path / "numbers/classes.json").exists()


def test_resharding_keeps_all_members_and_the_classes(tmp_path, command):
    import webdataset

    (tmp_path / "old").mkdir()
    png = io.BytesIO()
    Image.new("L", (8, 8)).save(png, "PNG")
    for shard in range(2):
        with webdataset.TarWriter(str(tmp_path / f"old/x-{shard}.tar")) as writer:
            for number in range(5):
                members = {"png": png.getvalue(), "cls": b"1", "seg.png": b"mask", "txt": f"{shard} {number}".encode()}
                writer.write({"__key__": f"a/{number}", "json": b'{"width": 8}', **members})
    (tmp_path / "old/classes.json").write_text('["cat", "dog"]')
    assert command("index", tmp_path / "old/*.tar")[0] == 0
    words = ["--samples-per-shard", 4, "--json", "--processes", 2]
    code, output = command("write", tmp_path / "old/x-{0..1}.tar", tmp_path / "new", *words)
    assert code == 0, output
    samples = samples_of(tmp_path / "new")
    assert {s["txt"] for s in samples} == {f"{a} {b}".encode() for a in range(2) for b in range(5)}
    assert [s["txt"] for s in samples] != sorted(s["txt"] for s in samples), "not shuffled"
    for sample in samples:
        shard, number = sample["txt"].decode().split()
        assert json.loads(sample["json"]) == {"width": 8, "source": f"x-{shard}.tar:a/{number}"}
        assert (sample["seg.png"], sample["png"], sample["cls"]) == (b"mask", png.getvalue(), b"1")
    assert (tmp_path / "new/classes.json").read_text() == '["cat", "dog"]'
    code, output = command("verify", tmp_path / "old/*.tar")
    assert code == 1
    assert "key a/0: in 2 samples" in output
    assert command("verify", tmp_path / "new/*.tar")[0] == 0


def test_train_and_validation_share_a_folder_its_index_and_the_classes_numbers(scans, written, tmp_path, command):
    some = tmp_path / "some"
    shutil.copytree(scans / "7", some / "7")
    code, output = command("write", some, written, "--prefix", "val")
    assert code == 0, output
    assert {s["cls"] for s in samples_of(written) if s["__key__"].startswith("val")} == {b"7"}
    assert load_index([f"{written}/train-{{000000..000004}}.tar", f"{written}/val-000000.tar"]).samples > 100
    assert command("verify", written / "*.tar")[0] == 0
    (some / "7").rename(some / "seven")
    code, output = command("write", some, written, "--prefix", "test")
    assert code == 2
    assert "class 'seven' is not in classes.json" in output


def slow_write(source, folder, **options):
    """A write that takes seconds, in a process group of its own."""
    words = [sys.executable, "-m", "pipeline.shards", "write", source, folder, *LONG]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        list(map(str, words)), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True, env=environment, **options,
    )  # fmt: skip


LONG = ["--samples-per-shard", 60, "--processes", 2, "--resize", 200, "--skip-bad"]


@pytest.fixture(scope="session")
def many(photos, tmp_path_factory):
    """900 hard links to the larger photographs, and one file that is no image: writing them takes seconds."""
    folder = tmp_path_factory.mktemp("many")
    for name in ("china", "flower"):
        (folder / name).mkdir()
        for number in range(450):
            (folder / name / f"{number:03d}.jpg").hardlink_to(photos / name / f"{2 + number % 2}.JPEG")
    (folder / "china/none.jpg").write_bytes(b"no image")
    return folder


@pytest.fixture(scope="session")
def uninterrupted(many, tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted") / "out"
    process = slow_write(many, folder)
    output, _ = process.communicate(timeout=100)
    assert process.returncode == 0, output
    assert "left out 1 bad samples" in output
    return contents(folder)


@pytest.mark.parametrize(
    ("name", "awaited"), [("SIGINT", "*-plan.json"), ("SIGINT", "*-000003.tar"), ("SIGKILL", "*-000003.tar")]
)
def test_an_interrupted_write_goes_on_to_the_same_bytes(many, uninterrupted, tmp_path, command, name, awaited):
    process = slow_write(many, tmp_path / "out")
    end = time.time() + 60
    while not list((tmp_path / "out").glob(awaited)):
        assert time.time() < end
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.01)
    if awaited == "*-plan.json":
        time.sleep(0.5)  # the workers are starting
    if name == "SIGINT":
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    else:
        process.kill()  # the parent only: its workers must not go on
    output, _ = process.communicate(timeout=60)
    whole = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("out/*.tar")}
    assert len(whole) < 16, "nothing was left to interrupt"
    if name == "SIGINT":
        assert process.returncode == 130, output
        assert "start the same command again to go on" in output
        assert "Traceback" not in output
        assert not list(tmp_path.glob("out/*.part"))
    code, output = command("write", many, tmp_path / "out", *LONG)
    assert code == 0, output
    assert contents(tmp_path / "out") == uninterrupted
    assert all((tmp_path / "out" / shard).stat().st_mtime_ns == mtime for shard, mtime in whole.items()), "written anew"


def test_another_plan_is_refused_with_what_differs(scans, written, tmp_path, command):
    before = contents(written)
    code, output = command("write", scans, written, "--samples-per-shard", 20, "--seed", 3, "--json")
    assert code == 2
    assert "--seed: there 0, now 3; --json: there False, now True" in output
    (tmp_path / "more").mkdir()
    shutil.copytree(scans, tmp_path / "more", dirs_exist_ok=True)
    shutil.copy(scans / "0/000.png", tmp_path / "more/0/new.png")
    code, output = command("write", tmp_path / "more", written, "--samples-per-shard", 20)
    assert code == 2
    assert "the source's files changed" in output
    assert contents(written) == before


def add(name, content=b""):
    def spoil(folder):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)

    return spoil


MISTAKES = {
    "missing": (shutil.rmtree, [], "src: not found; expected an image folder, a .csv or .parquet list, or .tar"),
    "no images": (lambda f: [shutil.rmtree(c) for c in f.iterdir()], [], "src: no images in it"),
    "empty class": (lambda f: (f / "x").mkdir(), [], "src/x: no images in this class; remove the folder"),
    "gif": (add("1/a.gif", b"GIF"), [], "src/1/a.gif: expected an ending among jpg, jpeg, png, webp"),
    "no class": (add("a.png", b"x"), [], "src/a.png: an image without a class; move it"),
    "empty file": (add("1/a.png"), [], "src/1/a.png: empty file"),
    "undecodable": (add("1/a.png", b"no"), ["--check"], "src/1/a.png: can't be decoded: no image"),
    "undecodable to resize": (add("1/a.png", b"no"), ["--resize", "4"], "src/1/a.png: can't be decoded: no image"),
    "foreign file": (lambda f: add("hello.txt")(f.parent / "out"), [], "out: not empty: hello.txt is there"),
    "size": (lambda f: None, ["--bytes-per-shard", "5 apples"], "--bytes-per-shard: expected a size such as 500MB"),
    "no process": (lambda f: None, ["--processes", "0"], "--processes: expected at least 1, found 0"),
    "no such quality": (lambda f: None, ["--quality", "200"], "--quality: expected 1 to 100, found 200"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line_and_exit_code_2(scans, tmp_path, command, name):
    spoil, words, message = MISTAKES[name]
    for digit in "01":
        shutil.copytree(scans / digit, tmp_path / "src" / digit)
    spoil(tmp_path / "src")
    code, output = command("write", tmp_path / "src", tmp_path / "out", "--processes", 1, *words)
    assert code == 2
    assert message in output
    assert not list(tmp_path.glob("out/*.tar*"))


LISTS = {
    "out of range": ("0/000.png,-1", "label -1 of 0/000.png: expected a whole number from 0 on"),
    "no number": ("0/000.png,1.5", "label 1.5 of 0/000.png: expected a whole number"),
    "two kinds": ("0/000.png,1\n0/000.png,cat", "label '1' is a number, 'cat' is a name; use one kind"),
    "no label": ("0/000.png,", "list.csv: line 2: no label"),
    "missing file": ("0/nope.png,1", "0/nope.png: No such file or directory; --skip-bad leaves bad samples out"),
}


@pytest.mark.parametrize("name", LISTS)
def test_a_bad_list_names_its_row(scans, tmp_path, command, name):
    rows, message = LISTS[name]
    shutil.copytree(scans / "0", tmp_path / "0")
    (tmp_path / "list.csv").write_text(f"path,label\n{rows}\n")
    code, output = command("write", tmp_path / "list.csv", tmp_path / "out")
    assert code == 2
    assert message in output
    code, output = command("write", tmp_path / "list.csv", tmp_path / "out", "--label-column", "klass")
    assert code == 2
    assert "no column 'klass' among path, label; name it with --label-column" in output


def test_skip_bad_lists_what_it_leaves_out(scans, tmp_path, command):
    shutil.copytree(scans, tmp_path / "src")
    add("1/a.gif", b"GIF")(tmp_path / "src")
    add("2/a.png", b"nope")(tmp_path / "src")
    code, output = command("write", tmp_path / "src", tmp_path / "out", "--skip-bad", "--check")
    assert code == 0, output
    assert len(samples_of(tmp_path / "out")) == 100
    rows = [json.loads(line) for line in (tmp_path / "out/train-skipped.jsonl").read_text().splitlines()]
    assert [(row["sample"].split("src/")[1], row["reason"].split(";")[0]) for row in rows] == [
        ("1/a.gif", "expected an ending among jpg, jpeg, png, webp"),
        ("2/a.png", "can't be decoded: no image (JPEG, PNG or WebP)"),
    ]
    assert command("verify", tmp_path / "out/*.tar")[0] == 0


def test_a_full_disk_leaves_the_finished_shards_whole_and_a_second_start_goes_on(scans, tmp_path, small_disk, command):
    words = ["--samples-per-shard", 20, "--no-shuffle", "--processes", 1]
    assert command("write", scans, tmp_path / "expected", *words)[0] == 0
    filler = small_disk / "filler"
    filler.write_bytes(bytes(os.statvfs(small_disk).f_bavail * 4096 - 150_000))
    code, output = command("write", scans, small_disk / "out", *words)
    assert code == 2
    assert "No space left on device; finished shards are kept" in output
    whole = contents(small_disk / "out")
    assert any(name.endswith(".tar") for name in whole)
    assert whole.items() <= contents(tmp_path / "expected").items()
    filler.unlink()
    assert command("write", scans, small_disk / "out", *words)[0] == 0
    assert contents(small_disk / "out") == contents(tmp_path / "expected")


def test_a_destination_that_is_no_folder_is_refused(scans, tmp_path, command):
    code, output = command("write", scans, tmp_path / "train-{0000..}.tar")
    assert code == 2
    assert "expected a folder; --prefix names the shards in it" in output
    assert not list(tmp_path.iterdir())


def test_parquet_without_pyarrow_names_the_command_to_install_it(tmp_path, command, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "x.parquet").write_bytes(b"PAR1")
    code, output = command("write", tmp_path / "x.parquet", tmp_path / "out")
    assert code == 2
    assert "pip install 'vit-pretrain[parquet]'" in output


# ---- verify


def flip(path, position, value=0xFF):
    content = bytearray(path.read_bytes())
    content[position] ^= value
    path.write_bytes(content)


def records_of(folder, shard=1):
    (found,) = load_index(f"{folder}/train-{shard:06d}.tar").shards
    return load_records(found)


def verified(command, folder, code):
    found, output = command("verify", folder / "train-*.tar", "--processes", 2, "--json", folder / "report.json")
    assert found == code, output
    return json.loads((folder / "report.json").read_text()), output


def test_whole_shards_pass_and_are_described(scans, written, command):
    report, output = verified(command, written, 0)
    assert "100 samples in 5 shards" in output
    assert "all shards are whole" in output
    assert report["sizes"] == {side: {"min": 8, "median": 8, "max": 8} for side in ("height", "width")}
    expected = {digit: len(list((scans / str(digit)).iterdir())) for digit in range(10)}
    assert {row["label"]: row["samples"] for row in report["labels"]} == expected
    assert [row["name"] for row in report["labels"]] == [str(digit) for digit in range(10)]


def test_every_bad_sample_is_named_and_hides_no_other(written, command):
    path = written / "train-000001.tar"
    records = records_of(written)
    content = path.read_bytes()
    flip(path, content.index(b"IDAT", int(records["offset"][3])) + 8)
    flip(path, int(records["offset"][7]) + 2)  # in the header of the first member
    flip(path, content.index(b".png", int(records["offset"][11])))  # in the header of the second
    report, output = verified(command, written, 1)
    assert [(os.path.basename(row["shard"]), row["key"]) for row in report["bad"]] == [
        ("train-000001.tar", "train-00000023"),
        ("train-000001.tar", "(number 7)"),
        ("train-000001.tar", "(number 11)"),
    ]
    assert "can't be decoded" in report["bad"][0]["reason"]
    assert sum(row["samples"] for row in report["labels"]) == 97
    assert "train-000001.tar: sample train-00000023: can't be decoded" in output
    assert "3 things are bad" in output


def test_a_truncated_a_missing_and_an_empty_shard_leave_the_rest_verified(written, command):
    cut_at = int(records_of(written)["offset"][15]) + 700
    os.truncate(written / "train-000001.tar", cut_at)
    (written / "train-000002.tar").write_bytes(b"")
    (written / "train-000003.tar").unlink()
    code, _ = command("verify", f"{written}/train-{{000000..000004}}.tar", "--json", written / "report.json")
    assert code == 1
    report = json.loads((written / "report.json").read_text())
    found = [(os.path.basename(row["shard"])[:12], row["key"], row["reason"]) for row in report["bad"]]
    assert found[0][:2] == ("train-000001", None)
    assert f"truncated: it has {cut_at} bytes" in found[0][2]
    assert [row[1] for row in found[1:6]] == [f"(number {number})" for number in range(15, 20)]
    assert [(row[:2]) for row in found[6:]] == [("train-000002", None), ("train-000003", None)]
    assert sum(row["samples"] for row in report["labels"]) == 40 + 15


def test_duplicate_keys_and_labels_outside_of_the_classes_are_found(written, command):
    shutil.copy(written / "train-000000.tar", written / "train-000005.tar")
    assert command("index", written / "*.tar")[0] == 0
    (written / "classes.json").write_text(json.dumps([str(digit) for digit in range(9)]))
    report, output = verified(command, written, 1)
    nines = [s for s in samples_of(written) if s["cls"] == b"9"]
    assert [row["key"] for row in report["bad"]] == [s["__key__"] for s in nines]
    assert "label 9 is out of range: classes.json names 9 classes" in output
    first = [f"train-{number:08d}" for number in range(20)]
    assert [row["key"] for row in report["duplicate_keys"]] == first
    assert [os.path.basename(url) for url in report["duplicate_keys"][0]["shards"]] == [
        "train-000000.tar",
        "train-000005.tar",
    ]


def test_a_changed_label_is_held_against_the_index(written, command):
    path = written / "train-000001.tar"
    begin = int(records_of(written)["offset"][0])
    flip(path, begin + 512, 0x01)  # the digit in the member cls
    report, _ = verified(command, written, 1)
    assert [row["key"] for row in report["bad"]] == ["train-00000020"]
    assert "the index says" in report["bad"][0]["reason"]


def test_verify_without_an_index_is_a_mistake(written, command):
    (written / "index.json").unlink()
    code, output = command("verify", written / "*.tar")
    assert code == 2
    assert "no index beside it" in output


# ---- the processes


def work(seconds):
    end = time.time() + seconds
    while time.time() < end:
        check_stop()
        time.sleep(0.01)
    return seconds


def test_given_up_work_ends_between_two_samples():
    results = in_processes(work, [(0,), (100,), (100,)], 2)
    assert next(results) == 0
    begin = time.time()
    results.close()
    assert time.time() - begin < 20


def test_a_killed_worker_is_an_error_and_no_hang():
    with pytest.raises(UserError, match=r"a worker process was killed .*fewer --processes"):
        list(in_processes(os.abort, [(), (), ()], 2))


# ---- the command


@pytest.mark.integration
def test_written_shards_train(written, tmp_path):
    words = [
        "run.steps=2",
        f"data.train={written}/train-{{000000..000003}}.tar",
        f"data.val={written}/train-000004.tar",
    ]
    code, output = train(*SMALL, *words, f"run.dir={tmp_path / 'run'}")
    assert code == 0, output
    assert "finished after step 1 of 1" in output or "held-out top-1" in output


def test_help_names_every_option(command):
    for name, options in (("write", ["--resize N", "--bytes-per-shard", "--skip-bad"]), ("verify", ["--json FILE"])):
        done = subprocess.run(
            [sys.executable, "-m", "pipeline.shards", name, "--help"], capture_output=True, text=True, cwd=ROOT
        )
        assert done.returncode == 0
        assert all(option in done.stdout for option in options)


def test_a_path_with_glob_characters_is_taken_as_it_is(tmp_path):
    from pipeline.shards import listed

    for name in ("a[1].tar", "a1.tar"):
        (tmp_path / name).write_bytes(b"")
    assert listed([f"{tmp_path}/a[1].tar"]) == [f"{tmp_path}/a[1].tar"]
    assert listed([f"{tmp_path}/a[2].tar"]) == [f"{tmp_path}/a[2].tar"]
    assert listed([f"{tmp_path}/a[[]1].tar", f"{tmp_path}/a*.tar"]) == [f"{tmp_path}/a[1].tar", f"{tmp_path}/a1.tar"]
