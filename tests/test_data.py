"""Training data: real, offline, split without leaks, and clear about what is missing or damaged."""

import json
import os

import numpy as np
import pytest
import torch

from models import data
from models.data import documents, images, text

CPU = torch.device("cpu")
HERE = torch.arange


@pytest.fixture(scope="module")
def noise(tmp_path_factory):
    """A whole CIFAR-10 in the official format, of noise; images of test_batch.bin are darker."""
    generator = np.random.default_rng(0)
    folder = tmp_path_factory.mktemp("cifar")
    for name in images.CIFAR10_TRAIN + images.CIFAR10_TEST:
        records = generator.integers(0, 256 if name != "test_batch.bin" else 100, (10_000, 3073), dtype=np.uint8)
        records[:, 0] = np.arange(10_000) % 10
        records.tofile(folder / name)
    return folder


@pytest.fixture
def cifar(noise, tmp_path):
    """The same in a folder where files may be replaced."""
    folder = tmp_path / images.CIFAR10_FOLDER
    folder.mkdir()
    for file in noise.iterdir():
        os.link(file, folder / file.name)
    return tmp_path


class TestImages:
    def test_digits_are_real_and_split_for_good(self):
        pytest.importorskip("sklearn")
        train, test = data.digits(64), data.digits(64, train=False)
        assert (len(train), len(test)) == (1437, 360)
        assert train.classes == tuple("0123456789")
        again = data.digits(64)
        assert torch.equal(train.pixels, again.pixels)
        seen = {pixels.numpy().tobytes() for pixels in train.pixels}
        assert not any(pixels.numpy().tobytes() in seen for pixels in test.pixels)
        batch = train.batch(HERE(3), CPU)
        assert batch["images"].shape == (3, 3, 64, 64)
        assert batch["images"].dtype == torch.float32
        assert torch.equal(batch["target"], train.labels[:3])

    def test_each_digit_is_held_out_by_one_fold(self):
        pytest.importorskip("sklearn")
        folds = [data.digits(64, train=False, fold=fold) for fold in range(5)]
        assert [len(fold) for fold in folds] == [360, 360, 360, 360, 357]
        whole = sum(int(fold.pixels.sum()) for fold in folds)
        for fold, test in enumerate(folds):
            train = data.digits(64, fold=fold)
            assert len(train) + len(test) == 1797
            assert int(train.pixels.sum()) + int(test.pixels.sum()) == whole
        with pytest.raises(data.DataError, match="fold must be 0 to 4, got 5"):
            data.digits(64, fold=5)

    def test_transform_is_the_textbooks(self):
        pixels = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
        found = data.Images(pixels, torch.tensor([0, 1]), ("a", "b"), size=224, resize=256).batch(HERE(2), CPU)
        resized = torch.nn.functional.interpolate(pixels.double() / 255, size=256, mode="bilinear")
        mean, std = (torch.tensor(v).double().view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
        expected = (resized[:, :, 16:240, 16:240] - mean) / std
        torch.testing.assert_close(found["images"].double(), expected, atol=1e-5, rtol=0)

    def test_cifar10_reads_labels_and_planes(self, cifar):
        train, test = data.cifar10(cifar, size=32, resize=32), data.cifar10(cifar, size=32, resize=32, train=False)
        assert (len(train), len(test)) == (50_000, 10_000)
        assert train.labels[:12].tolist() == [*range(10), 0, 1]
        raw = (cifar / images.CIFAR10_FOLDER / "data_batch_2.bin").read_bytes()[3073:6146]
        assert train.pixels[10_001].numpy().tobytes() == raw[1:]
        assert train.classes[raw[0]] == "automobile"
        assert test.pixels.max() < 100
        assert len(data.cifar10(cifar / images.CIFAR10_FOLDER, size=32, resize=32)) == 50_000

    def test_cifar10_names_what_is_missing_short_or_damaged(self, cifar, tmp_path):
        folder = cifar / images.CIFAR10_FOLDER
        with pytest.raises(data.DataError, match="at most the resized"):
            data.cifar10(cifar, size=64, resize=32)
        file = folder / "data_batch_3.bin"
        whole = file.read_bytes()
        damaged = bytearray(whole)
        damaged[3073 * 7] = 77
        file.unlink()
        file.write_bytes(damaged)
        with pytest.raises(data.DataError, match=r"data_batch_3\.bin is damaged: record 7 has the label 77"):
            data.cifar10(cifar)
        file.write_bytes(whole[:-1])
        with pytest.raises(data.DataError, match=r"data_batch_3\.bin has 30,729,999 bytes"):
            data.cifar10(cifar)
        file.unlink()
        with pytest.raises(data.DataError, match=r"data_batch_3\.bin is missing"):
            data.cifar10(cifar)
        with pytest.raises(data.DataError, match=r"nowhere.*is missing"):
            data.cifar10(tmp_path / "nowhere")


class TestText:
    def test_standard_library_holds_whole_files_out(self):
        train, test = data.standard_library(64, limit=20_000), data.standard_library(64, limit=5_000, train=False)
        assert len(train) == (20_000 - 1) // 64
        assert len(test) == (5_000 - 1) // 64
        assert b"def " in train.stream.numpy().tobytes()
        assert torch.equal(train.stream, data.standard_library(64, limit=20_000).stream)
        names = [name for name, _ in text.standard_library_files()]
        assert not any("test" in name.split("/") or "site-packages" in name for name in names)
        assert 0.03 < sum(map(text.held_out, names)) / len(names) < 0.25

    def test_windows_predict_the_next_byte(self):
        windows = data.ByteWindows(torch.arange(100, dtype=torch.uint8), 7)
        assert len(windows) == 14
        batch = windows.batch(torch.tensor([0, 13]), CPU)
        assert batch["tokens"].tolist() == [list(range(7)), list(range(91, 98))]
        assert torch.equal(batch["target"], batch["tokens"] + 1)

    def test_a_window_needs_text(self):
        with pytest.raises(data.DataError, match="one window needs 8"):
            data.ByteWindows(torch.zeros(7, dtype=torch.uint8), 7)

    def test_folder(self, tmp_path):
        (tmp_path / "deep").mkdir()
        (tmp_path / "a.txt").write_text("a" * 1000)
        (tmp_path / "deep" / "b.md").write_text("b" * 1000)
        (tmp_path / "picture.png").write_bytes(b"\x89PNG" * 1000)
        train, test = data.text_folder(tmp_path, 10), data.text_folder(tmp_path, 10, train=False)
        assert train.stream.numpy().tobytes() == b"a" * 900 + b"b" * 900
        assert test.stream.numpy().tobytes() == b"a" * 100 + b"b" * 100

    def test_a_large_folder_holds_files_out(self, tmp_path):
        for number in range(60):
            (tmp_path / f"{number}.txt").write_text(f"<{number}>" * 20)
        train, test = data.text_folder(tmp_path, 5), data.text_folder(tmp_path, 5, train=False)
        found = [{n for n in range(60) if f"<{n}>".encode() in part.stream.numpy().tobytes()} for part in (train, test)]
        assert found[0] | found[1] == set(range(60))
        assert not found[0] & found[1]

    @pytest.mark.parametrize("case", ["none", "file", "empty"])
    def test_folders_that_are_none(self, tmp_path, case):
        root = tmp_path / "x"
        if case == "file":
            root.write_text("text")
        if case == "empty":
            root.mkdir()
            (root / "empty.txt").touch()
        with pytest.raises(data.DataError, match="is not a folder" if case != "empty" else "holds no text file"):
            data.text_folder(root, 4)


class TestDocuments:
    def test_docstrings_come_from_real_packages(self, monkeypatch):
        files = [(name, path) for name, path in text.standard_library_files() if name.startswith(("json/", "email/"))]
        monkeypatch.setattr(documents, "standard_library_files", lambda: files)
        train, test = data.docstrings(classes=2, per_class=30)
        assert {label for _, label in train} == {"json", "email"} == {label for _, label in test}
        assert not {found for found, _ in train} & {found for found, _ in test}
        assert len(train) + len(test) <= 60
        assert (train, test) == data.docstrings(classes=2, per_class=30)

    def test_a_text_of_two_packages_is_no_evidence(self, monkeypatch, tmp_path):
        for package, own in (("left", "Left alone"), ("right", "Right alone")):
            (tmp_path / package).mkdir()
            (tmp_path / package / "a.py").write_text(f'"""Shared."""\ndef f():\n    """{own}."""\n')
            (tmp_path / package / "b.py").write_text("def broken(:\n")
        files = [(path.relative_to(tmp_path).as_posix(), path) for path in sorted(tmp_path.rglob("*.py"))]
        monkeypatch.setattr(documents, "standard_library_files", lambda: files)
        train, test = data.docstrings(classes=2)
        assert sorted(train + test) == [("Left alone.", "left"), ("Right alone.", "right")]

    def test_wordpiece_is_the_same_each_time_and_travels_as_text(self):
        pytest.importorskip("tokenizers")
        texts = ["Return the file name.", "Open a file and return it", "naming files, opened: it's café"] * 3
        tokenizer = data.Tokenizer.train(texts, 80)
        assert data.Tokenizer.train(texts[::-1], 80).describe() == tokenizer.describe()
        assert len(tokenizer) <= 80
        again = data.Tokenizer(tokenizer.describe())
        (short, long) = again.encode(["file", "return the file name " * 20], 10)
        assert short[0] == long[0] == documents.SPECIAL_TOKENS.index("[CLS]")
        assert short[-1] == long[-1] == documents.SPECIAL_TOKENS.index("[SEP]")
        assert len(long) == 10
        assert len(short) < 10

    def test_batches_are_padded_and_masked(self):
        tokens = [torch.tensor([2, 5, 3], dtype=torch.int32), torch.tensor([2, 3], dtype=torch.int32)]
        dataset = data.Documents(tokens, torch.tensor([1, 0]), ("a", "b"))
        batch = dataset.batch(torch.tensor([1, 0]), CPU)
        assert batch["tokens"].tolist() == [[2, 3, data.PAD], [2, 5, 3]]
        assert batch["attention_mask"].tolist() == [[1, 1, 0], [1, 1, 1]]
        assert batch["lengths"].tolist() == [2, 3]
        assert batch["target"].tolist() == [0, 1]
        assert dataset.majority() == 0.5

    def test_csv_and_jsonl_read_the_same(self, tmp_path):
        pairs = [(f'text "{n}", of\nlines', "yes" if n % 3 else "no") for n in range(30)]
        import csv

        with (tmp_path / "t.csv").open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([("body", "class"), *pairs])
        lines = [json.dumps({"body": body, "class": label}) for body, label in pairs]
        (tmp_path / "t.jsonl").write_text("\n".join(lines) + "\n\n")
        columns = {"text_column": "body", "label_column": "class"}
        found = data.labelled_file(tmp_path / "t.csv", **columns)
        assert found == data.labelled_file(tmp_path / "t.jsonl", **columns)
        assert sorted(found[0] + found[1]) == sorted(pairs)
        assert {label for _, label in found[1]} == {"yes", "no"}

    @pytest.mark.parametrize(
        ("name", "content", "message"),
        [
            ("t.csv", "text,label\na,x\n,y\n", "line 3: no 'text'"),
            ("t.csv", "text,kind\na,x\n", "line 2: no 'label'; it has 'text', 'kind'"),
            ("t.csv", "text,label\na,x\nb,x\n", "fewer than two classes"),
            ("t.jsonl", '{"text": "a", "label": 1}\n{"text": \n', "line 2 is not JSON"),
            ("t.jsonl", "[1]\n", "line 1 is not an object"),
            ("t.txt", "", "must end in .csv or .jsonl"),
        ],
    )
    def test_tables_that_are_broken(self, tmp_path, name, content, message):
        (tmp_path / name).write_text(content)
        with pytest.raises(data.DataError, match=message):
            data.labelled_file(tmp_path / name)

    def test_no_table(self, tmp_path):
        with pytest.raises(data.DataError, match="is not a file"):
            data.labelled_file(tmp_path / "t.csv")

    def test_split_holds_a_fifth_of_every_class_out(self):
        pairs = [(f"{label}{n}", label) for label, count in (("a", 50), ("b", 5), ("c", 2)) for n in range(count)]
        train, test = data.documents.split(pairs)
        assert sorted(train + test) == sorted(pairs)
        assert [sum(label == wanted for _, label in test) for wanted in "abc"] == [10, 1, 1]
