"""CIFAR's files: read as torchvision reads them, refused by name where they are not what they should be."""

from __future__ import annotations

import functools
import hashlib
import os
import pickle
import subprocess
import sys
import tarfile
import threading
import urllib.error
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dsaux.config import ConfigError, DataConfig
from dsaux.data import check_dataset, cifar, fetch, load_dataset, sample_counts
from dsaux.data.cifar import balanced_subset
from dsaux.data.cifar_files import KINDS
from dsaux.data.number_pickle import load_numbers
from tests.cifar_folders import (
    TEST,
    TRAIN,
    Pictures,
    as_python_2,
    names_for,
    pictures_for,
    rows_of,
    write_binary,
    write_python,
)

ROOT = Path(__file__).parents[2]
OWN = DataConfig(name="cifar10", loader="torch", download=False, verify=False)


@pytest.fixture(scope="module")
def pictures() -> dict[str, Pictures]:
    return {"cifar10": pictures_for(10), "cifar100": pictures_for(100)}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, pictures: dict[str, Pictures]) -> Path:
    """All four layouts, in `python` and `binary`; not to be changed."""
    root = tmp_path_factory.mktemp("cifar")
    for one in pictures.values():
        write_python(root / "python", one)
        write_binary(root / "binary", one)
    return root


def own(name: str, root: Path, **changes: Any) -> DataConfig:
    return replace(OWN, name=name, root=str(root), **changes)


# ---- the same as torchvision ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
@pytest.mark.parametrize("layout", ["python", "binary"])
def test_labels_pixels_and_names_are_those_that_torchvision_reads(monkeypatch, folders, name, layout):
    import torchvision.datasets.cifar as reference

    monkeypatch.setattr(reference, "check_integrity", lambda *_: True)  # the sums of the official files
    reader = {"cifar10": reference.CIFAR10, "cifar100": reference.CIFAR100}[name]
    train, test = (reader(str(folders / "python"), train=is_train) for is_train in (True, False))
    data = own(name, folders / layout)
    check_dataset(data)
    ours = load_dataset(data)
    assert np.array_equal(ours.train_images, train.data)
    assert np.array_equal(ours.test_images, test.data)
    assert ours.train_labels.tolist() == train.targets
    assert ours.test_labels.tolist() == test.targets
    assert ours.classes == tuple(names_for(ours.num_classes))
    assert train.classes == list(ours.classes)
    assert ours.train_images.dtype == np.uint8
    assert ours.train_labels.dtype == np.int64
    assert ours.train_images.flags.c_contiguous


@pytest.mark.parametrize("layout", ["cifar-10-batches-py", "cifar-10-batches-bin"])
def test_the_root_may_be_the_layouts_own_folder(folders, layout):
    parent = folders / ("python" if layout.endswith("py") else "binary")
    inner, outer = (load_dataset(own("cifar10", root)) for root in (parent / layout, parent))
    assert np.array_equal(inner.train_images, outer.train_images)


def test_without_a_root_the_folder_data_is_read(monkeypatch, tmp_path, pictures):
    write_binary(tmp_path / "data", pictures["cifar100"])
    monkeypatch.chdir(tmp_path)
    data = replace(OWN, name="cifar100")
    check_dataset(data)
    assert load_dataset(data).num_train == TRAIN


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
def test_own_files_of_any_pickle_protocol_are_read(tmp_path, pictures, protocol):
    write_python(tmp_path, pictures["cifar10"], protocol=protocol)
    dataset = load_dataset(own("cifar10", tmp_path))
    assert np.array_equal(dataset.train_images, pictures["cifar10"].train)
    assert np.array_equal(dataset.train_labels, pictures["cifar10"].train_labels)


def test_an_array_under_the_module_name_of_numpy_1_is_read():
    array = np.array([[1, 128], [255, 2]], dtype=np.uint8)
    raw = as_python_2({b"data": array, b"labels": [3, 4]})
    old = raw.replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
    for content in (raw, old):
        entries = load_numbers(content)
        assert np.array_equal(entries[b"data"], array)
        assert entries[b"labels"] == [3, 4]


def test_an_array_in_columns_and_one_of_other_byte_order_are_read():
    rows = np.arange(12, dtype=np.uint8).reshape(3, 4)
    for array in (np.asfortranarray(rows), rows.astype(">i4"), rows.astype("<u2")):
        for protocol in (2, 5):
            assert np.array_equal(load_numbers(pickle.dumps(array, protocol=protocol)), rows)


def test_the_known_files_and_sums_are_torchvisions():
    from torchvision.datasets import CIFAR10, CIFAR100

    for kind, reference in ((KINDS["cifar10"], CIFAR10), (KINDS["cifar100"], CIFAR100)):
        layout = kind.layouts[0]
        listed = [*reference.train_list, *reference.test_list, [reference.meta["filename"], reference.meta["md5"]]]
        assert dict(listed) == dict(layout.md5)
        assert layout.files == tuple(name for name, _ in listed)
        assert (layout.folder, kind.url, kind.archive_md5) == (
            reference.base_folder,
            reference.url,
            reference.tgz_md5,
        )


# ---- subsets and counts ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
@pytest.mark.parametrize("layout", ["python", "binary"])
def test_a_subset_is_balanced_up_to_one_and_part_of_every_larger_one(folders, pictures, name, layout):
    data = own(name, folders / layout, train_samples=150, test_samples=100)
    check_dataset(data)
    small, large = (load_dataset(replace(data, train_samples=count)) for count in (150, 210))
    counts = np.bincount(small.train_labels, minlength=small.num_classes)
    assert small.num_train == 150
    assert counts.max() - counts.min() <= 1
    assert {image.tobytes() for image in small.train_images} <= {image.tobytes() for image in large.train_images}
    again = load_dataset(data)
    assert np.array_equal(again.train_images, small.train_images)


def test_a_subset_takes_the_first_of_each_class_then_the_second():
    labels = np.array([0, 0, 0, 1, 2, 1, 0, 2])
    assert balanced_subset(labels, 3).tolist() == [0, 3, 4]
    assert balanced_subset(labels, 5).tolist() == [0, 1, 3, 4, 5]
    assert balanced_subset(labels, 8).tolist() == list(range(8))


@pytest.mark.parametrize("layout", ["python", "binary"])
def test_samples_are_counted_from_the_files(folders, layout):
    data = own("cifar10", folders / layout)
    assert sample_counts(data) == (TRAIN, TEST)
    assert sample_counts(replace(data, test_samples=20)) == (TRAIN, 20)


def test_samples_of_files_that_are_yet_to_be_fetched_are_the_official_ones(tmp_path):
    assert sample_counts(own("cifar100", tmp_path, download=True)) == (50_000, 10_000)


# ---- wrong, missing, cut off, altered -------------------------------------------------------------------------------


def test_missing_files_are_refused_with_the_folder_the_files_and_the_way_out(tmp_path):
    with pytest.raises(ConfigError) as caught:
        check_dataset(own("cifar10", tmp_path))
    words = str(caught.value)
    for part in (str(tmp_path), "cifar-10-batches-py", "data_batch_5", "cifar-10-batches-bin", "test_batch.bin"):
        assert part in words
    assert "dsaux.data.download is false. Set it to true" in words
    assert "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz" in words
    assert "\n" not in words


@pytest.mark.parametrize("missing", ["data_batch_3", "batches.meta"])
def test_one_missing_file_is_named_and_nothing_is_fetched(monkeypatch, tmp_path, pictures, missing):
    monkeypatch.setattr(cifar, "fetch_archive", lambda *_, **__: pytest.fail("fetched"))
    folder = write_python(tmp_path, pictures["cifar10"])
    (folder / missing).unlink()
    with pytest.raises(ConfigError, match=rf"cifar-10-batches-py is a folder of cifar10 but lacks {missing}\."):
        check_dataset(own("cifar10", tmp_path, download=True))


def test_a_missing_file_in_a_folder_of_another_name_is_named_and_the_folder_is_not_to_be_removed(tmp_path, pictures):
    folder = write_python(tmp_path, pictures["cifar10"]).rename(tmp_path / "mine")
    (folder / "test_batch").unlink()
    with pytest.raises(ConfigError, match=r"mine is a folder of cifar10 but lacks test_batch\. Put .* there\.$"):
        check_dataset(own("cifar10", folder))


def test_a_stray_file_of_a_common_name_is_not_taken_for_a_part_of_cifar100(tmp_path):
    (tmp_path / "train").write_text("something else")
    with pytest.raises(ConfigError, match="has no files of cifar100"):
        check_dataset(own("cifar100", tmp_path))


def test_the_folder_of_the_other_data_set_is_refused(folders):
    with pytest.raises(ConfigError, match=r'a folder of cifar10, but dsaux.data.name is "cifar100"'):
        check_dataset(own("cifar100", folders / "python" / "cifar-10-batches-py"))


@pytest.mark.parametrize(("left", "says"), [(10_000, "not a multiple of 3073"), (0, "has 0 bytes")])
def test_a_binary_file_that_is_cut_off_is_named(tmp_path, pictures, left, says):
    path = write_binary(tmp_path, pictures["cifar10"]) / "data_batch_2.bin"
    path.write_bytes(path.read_bytes()[:left])
    for function in (check_dataset, load_dataset):
        with pytest.raises(ConfigError, match=rf"data_batch_2\.bin .*{says}"):
            function(own("cifar10", tmp_path))


def test_a_pickle_that_is_cut_off_is_named(tmp_path, pictures):
    path = write_python(tmp_path, pictures["cifar100"]) / "train"
    path.write_bytes(path.read_bytes()[:-5000])
    for function in (check_dataset, load_dataset):
        with pytest.raises(ConfigError, match=r"cifar-100-python/train cannot be read: .*Replace it"):
            function(own("cifar100", tmp_path))


def _entries(**changes: Any) -> dict[bytes, Any]:
    entries = {"data": np.zeros((4, 3072), dtype=np.uint8), "labels": [0, 1, 2, 9], **changes}
    return {key.encode(): value for key, value in entries.items() if value is not None}


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (_entries(labels=None), r"has no labels, only"),
        (
            _entries(data=None, labels=None, fine_labels=[1] * 4000),
            r"has no data and no labels, only .*another data set",
        ),
        (_entries(labels=[0, 1, 2, 10]), r"has the labels 0 \.\. 10; cifar10 has 0 \.\. 9"),
        (_entries(labels=[0, 1, 2, -1]), r"has the labels -1 \.\. 2"),
        (_entries(labels=[0, 1, 2]), r"has 4 images and labels of shape \(3,\)"),
        (_entries(labels=[0, 1, 2, 2.5]), r"labels that are not all whole numbers"),
        (_entries(labels=[[0], [1, 2], [3], [4]]), r"labels that are not all whole numbers"),
        (
            _entries(data=np.zeros((4, 3071), dtype=np.uint8)),
            r"data of uint8 \(4, 3071\); it must be .*uint8 \(N, 3072\)",
        ),
        (_entries(data=np.zeros((4, 3072), dtype=np.int16)), r"data of int16"),
        (_entries(data=np.zeros((0, 3072), dtype=np.uint8), labels=[]), r"too few for 1 x|one image at least"),
        (_entries(data=[[0] * 3072] * 4), r"data of list"),
        (_entries(data=np.zeros((4, 3072))), r"array of type 'f8', where whole numbers are expected"),
        (_entries(data=np.array([None] * 4000)), r"array of type 'O"),
        ([1] * 4000, r"holds a list; it must be a dict"),
    ],
)
def test_a_pickle_with_other_content_is_named_with_what_it_holds(tmp_path, pictures, content, says):
    path = write_python(tmp_path, pictures["cifar10"]) / "data_batch_4"
    path.write_bytes(pickle.dumps(content, protocol=2))
    with pytest.raises(ConfigError, match=rf"data_batch_4 .*({says})") as caught:
        load_dataset(own("cifar10", tmp_path))
    assert "\n" not in str(caught.value)


def test_a_binary_label_out_of_range_is_named(tmp_path, pictures):
    path = write_binary(tmp_path, pictures["cifar100"]) / "test.bin"
    raw = bytearray(path.read_bytes())
    raw[1] = 100
    path.write_bytes(bytes(raw))
    with pytest.raises(ConfigError, match=r"test\.bin has the labels 0 \.\. 100; cifar100 has 0 \.\. 99"):
        load_dataset(own("cifar100", tmp_path))


@pytest.mark.parametrize("layout", ["python", "binary"])
def test_a_wrong_number_of_class_names_is_named(tmp_path, pictures, layout):
    if layout == "python":
        (write_python(tmp_path, pictures["cifar10"]) / "batches.meta").write_bytes(pickle.dumps({"label_names": ["a"]}))
    else:
        (write_binary(tmp_path, pictures["cifar10"]) / "batches.meta.txt").write_text("a\n")
    with pytest.raises(ConfigError, match=r"batches\.meta.* has 1 names of classes; cifar10 has 10"):
        load_dataset(own("cifar10", tmp_path))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"train_samples": TRAIN + 1}, rf"train_samples is {TRAIN + 1} but .* has {TRAIN} such images"),
        ({"test_samples": 9}, r"test_samples is 9, fewer than the 10 classes of cifar10"),
        ({"image_size": 28}, r"image_size is 28; cifar10 has images of 32 x 32 pixels"),
    ],
)
def test_keys_that_do_not_fit_the_files_are_refused(folders, changes, says):
    with pytest.raises(ConfigError, match=says):
        check_dataset(own("cifar10", folders / "binary", **changes))


@pytest.fixture
def official(monkeypatch, tmp_path, pictures) -> Path:
    """A folder whose files are taken for the official ones."""
    folder = write_python(tmp_path, pictures["cifar10"])
    sums = {path.name: hashlib.md5(path.read_bytes()).hexdigest() for path in folder.iterdir()}
    layout = replace(KINDS["cifar10"].layouts[0], md5=sums)
    layouts = (layout, KINDS["cifar10"].layouts[1])
    monkeypatch.setitem(KINDS, "cifar10", replace(KINDS["cifar10"], layouts=layouts))
    monkeypatch.setattr(cifar, "TRAIN", TRAIN)
    monkeypatch.setattr(cifar, "TEST", TEST)
    return folder


def test_official_files_are_read_and_each_is_read_once(monkeypatch, official):
    seen: list[str] = []
    content = cifar._content
    monkeypatch.setattr(cifar, "_content", lambda path: (seen.append(path.name), content(path))[1])
    data = own("cifar10", official, verify=True)
    check_dataset(data)
    assert sample_counts(data) == (TRAIN, TEST)
    assert seen == []  # the sums are checked when the images are loaded, not twice
    load_dataset(data)
    assert sorted(seen) == sorted(path.name for path in official.iterdir())


@pytest.mark.parametrize("name", ["data_batch_5", "batches.meta"])
def test_an_altered_file_is_named_with_its_sum_unless_own_files_are_allowed(official, name):
    path = official / name
    path.write_bytes(path.read_bytes()[:-1] + b"." + b"x")  # one byte behind the pickle's end
    data = own("cifar10", official, verify=True)
    with pytest.raises(ConfigError, match=rf"{name} is not the official file: its MD5 is .*verify to false"):
        load_dataset(data)
    assert load_dataset(replace(data, verify=False)).num_train == TRAIN


@pytest.mark.parametrize(("layout", "says"), [("python", "too few for 10000 x"), ("binary", "has 60 images, but")])
def test_small_files_are_not_taken_for_the_official_ones(folders, layout, says):
    with pytest.raises(ConfigError, match=rf"data_batch_1.* {says}.*verify to false"):
        check_dataset(own("cifar10", folders / layout, verify=True))


def test_official_binary_files_have_as_many_images_of_each_class(monkeypatch, tmp_path, pictures):
    monkeypatch.setattr(cifar, "TRAIN", TRAIN)
    monkeypatch.setattr(cifar, "TEST", TEST)
    folder = write_binary(tmp_path, pictures["cifar10"])
    data = own("cifar10", tmp_path, verify=True)
    assert load_dataset(data).num_train == TRAIN
    raw = bytearray((folder / "test_batch.bin").read_bytes())
    raw[0] = (raw[0] + 1) % 10
    (folder / "test_batch.bin").write_bytes(bytes(raw))
    with pytest.raises(ConfigError, match=r"test_batch\.bin: a class has 9, another 11 images"):
        load_dataset(data)


# ---- pickles that are programs --------------------------------------------------------------------------------------


class Trap:
    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize(
    ("function", "arguments"),
    [(os.system, ("touch {trap}",)), (exec, ("open({trap!r}, 'w')",)), (open, ("{trap}", "w")), (eval, ("1",))],
)
@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_a_pickle_with_code_is_refused_and_runs_nothing(tmp_path, pictures, function, arguments, protocol):
    trap = tmp_path / "trap"
    path = write_python(tmp_path, pictures["cifar10"]) / "data_batch_1"
    call = Trap(function, *(argument.format(trap=str(trap)) for argument in arguments))
    path.write_bytes(pickle.dumps({b"data": np.zeros(4000, np.uint8), b"labels": call}, protocol=protocol))
    with pytest.raises(
        ConfigError, match=rf"data_batch_1 cannot be read: it names .*{function.__name__}, which no file"
    ):
        load_dataset(own("cifar10", tmp_path))
    assert not trap.exists()


@pytest.mark.parametrize("name", ["numpy.f2py\nrun_main", "numpy\nload", "builtins\ngetattr", "numpy\nndarray.tofile"])
def test_no_other_name_is_looked_up_not_even_of_numpy(name):
    with pytest.raises(ValueError, match="which no file of numbers needs"):
        load_numbers(f"c{name}\n(tR.".encode())


def test_an_array_that_claims_more_bytes_than_it_has_is_refused():
    array = pickle.dumps({b"data": np.zeros((4, 3072), np.uint8)}, protocol=2)
    with pytest.raises(ValueError, match="whose bytes are not there"):
        load_numbers(array.replace(b"K\x04M\x00\x0c", b"K\x05M\x00\x0c"))


# ---- fetching -------------------------------------------------------------------------------------------------------


@pytest.fixture
def archive(monkeypatch, tmp_path, pictures) -> Iterator[Path]:
    """An archive on a server of this process that stands in for the official one; none of its files is verified."""
    folder = write_python(tmp_path / "source", pictures["cifar10"])
    path = tmp_path / "archive.tar.gz"
    with tarfile.open(path, "w:gz") as tar:
        tar.add(folder, arcname=folder.name)
    md5 = hashlib.md5(path.read_bytes()).hexdigest()
    monkeypatch.setenv("no_proxy", "*")
    handler = functools.partial(QuietHandler, directory=str(tmp_path))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/archive.tar.gz"
        monkeypatch.setitem(KINDS, "cifar10", replace(KINDS["cifar10"], url=url, archive_md5=md5))
        yield path
        server.shutdown()


class QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, *_: Any) -> None:
        pass


def leftovers(root: Path) -> set[str]:
    return {path.name for path in root.iterdir()} - {".cifar-10-batches-py.lock"}


def test_missing_files_are_fetched_once_and_nothing_else_is_left(archive, tmp_path, monkeypatch):
    root = tmp_path / "new" / "root"
    data = own("cifar10", root, download=True)
    check_dataset(data)
    assert leftovers(root) == {"cifar-10-batches-py"}
    monkeypatch.setattr(cifar, "fetch_archive", lambda *_, **__: pytest.fail("fetched again"))
    check_dataset(data)
    assert load_dataset(data).num_train == TRAIN


def test_a_root_that_is_to_become_the_layouts_folder_is_fetched_beside_its_name(archive, tmp_path):
    root = tmp_path / "new" / "cifar-10-batches-py"
    check_dataset(own("cifar10", root, download=True))
    assert leftovers(root.parent) == {"cifar-10-batches-py"}


@pytest.mark.parametrize("failure", ["sum", "network", "archive", "silence"])
def test_a_failed_download_says_why_and_what_to_do_and_leaves_nothing(archive, tmp_path, monkeypatch, failure):
    import torchvision.datasets.utils as downloader

    reason = {"sum": "corrupted", "network": "Name or service", "archive": "ReadError|EOFError", "silence": "timed out"}
    if failure == "sum":
        archive.write_bytes(archive.read_bytes() + b"x")
    elif failure == "archive":
        archive.write_bytes(archive.read_bytes()[:1000])
        md5 = hashlib.md5(archive.read_bytes()).hexdigest()
        monkeypatch.setitem(KINDS, "cifar10", replace(KINDS["cifar10"], archive_md5=md5))
    else:
        error = (
            TimeoutError("timed out") if failure == "silence" else urllib.error.URLError("Name or service not known")
        )

        def refuse(*_: Any, **__: Any) -> None:
            raise error

        monkeypatch.setattr(downloader, "download_url", refuse)
    root, url = tmp_path / "root", KINDS["cifar10"].url
    with pytest.raises(ConfigError, match=reason[failure]) as caught:
        check_dataset(own("cifar10", root, download=True))
    words = str(caught.value)
    assert f"fetching {url} failed" in words
    assert f"Unpack {url} into {root}, or set dsaux.data.root" in words
    assert "data_batch_1" in words
    assert "\n" not in words
    assert leftovers(root) == set()


def test_a_lock_that_is_never_given_back_ends_the_wait_with_an_error(archive, tmp_path, monkeypatch):
    from filelock import FileLock

    monkeypatch.setattr(fetch, "LOCK_TIMEOUT_S", 0.01)
    root = tmp_path / "root"
    root.mkdir()
    with (
        FileLock(root / ".cifar-10-batches-py.lock"),
        pytest.raises(ConfigError, match=r"another process has kept .*\.lock for 0\.01 s"),
    ):
        check_dataset(own("cifar10", root, download=True))


def test_a_host_that_was_first_in_spite_of_the_lock_is_no_error(archive, tmp_path, pictures, monkeypatch):
    root, fetch_really = tmp_path / "root", fetch._fetch

    def come_second(url: str, **places: Any) -> None:
        write_python(root, pictures["cifar10"])
        fetch_really(url, **places)

    monkeypatch.setattr(fetch, "_fetch", come_second)
    check_dataset(own("cifar10", root, download=True))
    assert leftovers(root) == {"cifar-10-batches-py"}


def test_two_processes_fetch_once(tmp_path, pictures):
    """Both stand before the lock, which this process holds, before one of them gets it."""
    from filelock import FileLock

    source, root, log = write_python(tmp_path / "source", pictures["cifar10"]), tmp_path / "root", tmp_path / "log"
    root.mkdir()
    code = f"""
import shutil, sys
from pathlib import Path
from dsaux.config import DataConfig
from dsaux.data import check_dataset, fetch

def copy(url, *, md5, into, folder):
    with open({str(log)!r}, "a") as file:
        file.write("fetched\\n")
    shutil.copytree({str(source)!r}, into / "half")
    (into / "half").rename(into / folder)

fetch._fetch = copy
print("ready", flush=True)
check_dataset(DataConfig(name="cifar10", loader="torch", root={str(root)!r}, verify=False))
"""
    with FileLock(root / ".cifar-10-batches-py.lock"):
        started = [
            subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
            for _ in range(2)
        ]
        for process in started:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
    for process in started:
        process.communicate(timeout=100)
        assert process.returncode == 0
    assert log.read_text() == "fetched\n"
    assert load_dataset(own("cifar10", root)).num_train == TRAIN


def test_rows_of_the_fixtures_are_red_then_green_then_blue():
    image = np.arange(3072, dtype=np.int64).reshape(1, 32, 32, 3).astype(np.uint8)
    assert rows_of(image)[0, :1024].tolist() == image[0, :, :, 0].ravel().tolist()
