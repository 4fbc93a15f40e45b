"""Training: checkpoints that lose nothing, resuming bit for bit, freezing, early stopping, metrics, clear errors."""

import dataclasses
import json
import math
import os
import pickle
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from fastops import _env
from models import train as command
from models.training import checkpoint, compare, folder, plots, presets, tasks
from models.training.distributed import Processes
from models.training.loop import Stop, Trainer
from models.training.options import OptionError, Options
from models.training.run import Run, train

pytest.importorskip("tokenizers")
ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")
WORDS = ("open", "read", "write", "close", "file", "path", "name", "socket", "thread", "lock", "queue", "token")


@pytest.fixture
def table(tmp_path):
    """60 texts in three classes that their words tell apart."""
    lines = []
    for number in range(60):
        words = [WORDS[(number * 7 + k * (number % 3 + 1)) % len(WORDS)] for k in range(3 + number % 5)]
        lines.append(json.dumps({"text": " ".join(words), "label": "abc"[number % 3]}))
    path = tmp_path / "table.jsonl"
    path.write_text("\n".join(lines))
    return path


@pytest.fixture
def library(tmp_path):
    folder = tmp_path / "text"
    folder.mkdir()
    (folder / "a.txt").write_text("the quick brown fox jumps over the lazy dog. " * 40)
    return folder


@pytest.fixture
def dropout(monkeypatch):
    """The tiny transformer with dropout, so that random numbers matter."""
    preset = presets.PRESETS["transformer", "classify"]["tiny"]
    noisy = dataclasses.replace(preset, model=preset.model | {"dropout": 0.3})
    monkeypatch.setitem(presets.PRESETS["transformer", "classify"], "tiny", noisy)


def options(table, tmp_path, **changes):
    fields = {"model": "transformer", "preset": "tiny", "data": "table", "root": str(table), "device": "cpu"}
    return Options(**fields | {"out": str(tmp_path / "out")} | changes)


def lines_of(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def without_clock(state):
    """A checkpoint without what depends on the time of day."""
    progress = dict(state["progress"])
    progress.pop("seconds")
    progress["epochs"] = [
        {name: value for name, value in summary.items() if name not in ("seconds", "samples_per_s")}
        for summary in progress["epochs"]
    ]
    return {**state, "progress": progress}


class StopAt(Stop):
    """Rings after so many steps of a run, as Ctrl-C would."""

    def __init__(self, steps):
        self.left = steps

    @property
    def signal(self):
        self.left -= 1
        return signal.SIGINT if self.left < 0 else 0

    @signal.setter
    def signal(self, value):
        pass


def interrupt_after(monkeypatch, steps):
    original = Run.__init__

    def init(self, *args):
        original(self, *args)
        self.stop = StopAt(steps)

    monkeypatch.setattr(Run, "__init__", init)


class TestRun:
    def test_what_it_leaves_behind(self, table, tmp_path, capsys):
        metrics, picture = tmp_path / "deep" / "m.jsonl", tmp_path / "deep" / "curves.png"
        assert train(options(table, tmp_path, epochs=2, metrics=str(metrics), plot=str(picture))) == 0
        events = lines_of(metrics)
        assert [event["event"] for event in events if event["event"] != "step"] == ["start", "epoch", "epoch", "end"]
        epochs = [event for event in events if event["event"] == "epoch"]
        assert 0 <= epochs[1]["test_accuracy"] <= 1
        assert epochs[1]["step"] == 12
        assert picture.read_bytes().startswith(b"\x89PNG")
        last = checkpoint.load(tmp_path / "out" / "last.pt")
        assert len(last["progress"]["losses"]) == 12
        assert last["progress"]["best"] == max(epoch["test_accuracy"] for epoch in epochs)
        assert (tmp_path / "out" / "best.pt").is_file()
        assert not list((tmp_path / "out").glob("*.part"))
        out = capsys.readouterr().out
        assert "epoch 2: loss" in out
        assert "most frequent class: 33.33%" in out

    def test_it_learns(self, table, tmp_path):
        train(options(table, tmp_path, epochs=12, learning_rate=0.01))
        losses = checkpoint.load(tmp_path / "out" / "last.pt")["progress"]["losses"]
        assert sum(losses[-6:]) < 0.6 * sum(losses[:6])

    def test_bits_per_byte(self, library, tmp_path):
        wanted = {"task": "lm", "data": "text", "root": str(library), "learning_rate": 0.01}
        train(options(library, tmp_path, epochs=4, metrics=str(tmp_path / "m.jsonl"), **wanted))
        *_, epoch = (event for event in lines_of(tmp_path / "m.jsonl") if event["event"] == "epoch")
        assert epoch["test_bits_per_byte"] == pytest.approx(epoch["test_loss"] / math.log(2))
        assert epoch["test_bits_per_byte"] < 6

    def test_same_seed_same_run(self, table, tmp_path, dropout):
        for name in ("a", "b"):
            train(options(table, tmp_path, out=str(tmp_path / name)))
        train(options(table, tmp_path, out=str(tmp_path / "c"), seed=1))
        a, b, c = (checkpoint.load(tmp_path / name / "last.pt") for name in "abc")
        assert same(without_clock(a), without_clock(b))
        assert not same(a["model"], c["model"])

    def test_early_stop(self, table, tmp_path, capsys):
        train(options(table, tmp_path, epochs=50, early_stop=2, learning_rate=1e-9))
        assert checkpoint.load(tmp_path / "out" / "last.pt")["progress"]["epoch"] == 3
        assert "no better accuracy for 2 epochs" in capsys.readouterr().out

    def test_diverged(self, library, tmp_path, capsys):
        arguments = ["transformer", "--task", "lm", "--preset", "tiny", "--data", "text", "--root", str(library)]
        assert command.main([*arguments, "--lr", "1e30", "--out", str(tmp_path / "out")]) == 1
        assert "try a smaller --lr" in capsys.readouterr().err

    @pytest.mark.parametrize("amp", ["bf16", "fp16"])
    def test_mixed_precision(self, table, tmp_path, amp):
        train(options(table, tmp_path, amp=amp, epochs=2))
        state = checkpoint.load(tmp_path / "out" / "last.pt")
        assert all(map(math.isfinite, state["progress"]["losses"]))
        assert bool(state["scaler"]) == (amp == "fp16")


class TestResume:
    def test_bit_for_bit_from_the_middle_of_an_epoch(self, table, tmp_path, dropout, monkeypatch):
        whole, parts = str(tmp_path / "whole"), str(tmp_path / "parts")
        assert train(options(table, tmp_path, epochs=3, out=whole)) == 0
        with monkeypatch.context() as patch:
            interrupt_after(patch, 9)
            assert train(options(table, tmp_path, epochs=3, out=parts)) == 130
        stopped = checkpoint.load(f"{parts}/last.pt")["progress"]
        assert (stopped["epoch"], stopped["position"], stopped["step"]) == (1, 4, 10)
        torch.manual_seed(12345)  # the process that resumes has other random numbers
        resumed = Options(model="transformer", root=str(table), resume=f"{parts}/last.pt", out=parts, epochs=3)
        assert train(resumed) == 0
        a, b = checkpoint.load(f"{whole}/last.pt"), checkpoint.load(f"{parts}/last.pt")
        assert same(without_clock(a), without_clock(b))

    def test_options_that_define_a_run_cannot_change(self, table, tmp_path):
        train(options(table, tmp_path))
        file = str(tmp_path / "out" / "last.pt")
        with pytest.raises(checkpoint.CheckpointError, match="was written with batch 8, not 4"):
            train(Options(model="transformer", root=str(table), resume=file, batch=4), given={"batch"})
        with pytest.raises(checkpoint.CheckpointError, match="model 'transformer', not 'lstm'"):
            train(Options(model="lstm", root=str(table), resume=file), given={"model"})

    def test_a_finished_run_says_so(self, table, tmp_path, capsys):
        train(options(table, tmp_path))
        assert train(Options(model="transformer", root=str(table), resume=str(tmp_path / "out" / "last.pt"))) == 0
        assert "1 epoch done already" in capsys.readouterr().out

    def test_the_tokenizer_travels(self, table, tmp_path):
        train(options(table, tmp_path))
        state = checkpoint.load(tmp_path / "out" / "last.pt")
        assert state["task"]["classes"] == ["a", "b", "c"]
        table.write_text(table.read_text() + "\n" + json.dumps({"text": "utterly new words", "label": "a"}))
        file = str(tmp_path / "out" / "last.pt")
        assert train(Options(model="transformer", root=str(table), resume=file, epochs=2, out=str(tmp_path / "o"))) == 0

    @pytest.mark.parametrize("save_every", [2, 3])
    def test_save_every(self, table, tmp_path, save_every, monkeypatch):
        saved = []
        monkeypatch.setattr(
            checkpoint, "save", lambda path, state: saved.append((path.name, state["progress"]["step"]))
        )
        train(options(table, tmp_path, save_every=save_every))
        steps = [step for step in range(1, 7) if step % save_every == 0]
        assert saved == [*(("last.pt", step) for step in steps), ("last.pt", 6), ("best.pt", 6)]


CONTENT = {"model": {"w": torch.arange(3)}, "n": 1}


class TestCheckpoint:
    def test_there_and_back(self, tmp_path):
        path = tmp_path / "new" / "folder" / "c.pt"
        checkpoint.save(path, CONTENT)
        assert same(checkpoint.load(path), {"format": checkpoint.FORMAT, **CONTENT})
        assert [file.name for file in path.parent.iterdir()] == ["c.pt"]
        umask = os.umask(0)
        os.umask(umask)
        assert path.stat().st_mode & 0o777 == 0o666 & ~umask

    @pytest.mark.parametrize("broken", ["save", "fsync", "replace"])
    def test_an_interrupted_write_loses_nothing(self, tmp_path, monkeypatch, broken):
        path = tmp_path / "c.pt"
        checkpoint.save(path, CONTENT)
        before = path.read_bytes()

        def fail(*args, **kwargs):
            if broken == "save":
                args[1].write(b"half a checkpoint")
            raise KeyboardInterrupt

        monkeypatch.setattr(torch if broken == "save" else os, broken, fail)
        with pytest.raises(KeyboardInterrupt):
            checkpoint.save(path, {"model": {"w": torch.zeros(9)}})
        monkeypatch.undo()
        assert path.read_bytes() == before
        assert [file.name for file in tmp_path.iterdir()] == ["c.pt"]

    def test_what_is_no_checkpoint(self, tmp_path):
        path = tmp_path / "c.pt"
        with pytest.raises(checkpoint.CheckpointError, match=r"c\.pt is missing"):
            checkpoint.load(path)
        checkpoint.save(path, CONTENT)
        whole = path.read_bytes()
        for damaged in (whole[: len(whole) // 2], b"", b"not a checkpoint", whole[:200] + b"\0" * 400 + whole[600:]):
            path.write_bytes(damaged)
            with pytest.raises(checkpoint.CheckpointError, match=r"c\.pt"):
                checkpoint.load(path)
        for content, reason in ((b"", "is empty$"), (b"it is text\n", "no checkpoint: [A-Z][A-Za-z]+Error")):
            path.write_bytes(content)
            with pytest.raises(checkpoint.CheckpointError, match=reason):
                checkpoint.load(path)
        torch.save([1, 2], path)
        with pytest.raises(checkpoint.CheckpointError, match="was not written by"):
            checkpoint.load(path)
        torch.save({"format": 99, "model": {}}, path)
        with pytest.raises(checkpoint.CheckpointError, match="has format 99"):
            checkpoint.load(path)

    def test_it_runs_no_code(self, tmp_path):
        class Evil:
            def __reduce__(self):
                return os.system, (f"touch {tmp_path}/ran",)

        path = tmp_path / "c.pt"
        torch.save({"format": 1, "model": Evil()}, path)
        with pytest.raises(checkpoint.CheckpointError):
            checkpoint.load(path)
        path.write_bytes(pickle.dumps(Evil()))
        with pytest.raises(checkpoint.CheckpointError):
            checkpoint.load(path)
        assert not (tmp_path / "ran").exists()


class TestTransfer:
    def test_new_head_frozen_body(self, table, tmp_path, capsys):
        train(options(table, tmp_path))
        first = checkpoint.load(tmp_path / "out" / "last.pt")["model"]
        lines = [json.loads(line) for line in table.read_text().splitlines()]
        two = tmp_path / "two.jsonl"
        two.write_text("\n".join(json.dumps(line | {"label": "a" if line["label"] == "a" else "b"}) for line in lines))
        changes = {"init_from": str(tmp_path / "out" / "last.pt"), "freeze": ("e*", "encoder.*")}
        train(options(two, tmp_path, out=str(tmp_path / "second"), **changes))
        second = checkpoint.load(tmp_path / "second" / "last.pt")["model"]
        assert second["classifier.weight"].shape[0] == 2
        body = [name for name in first if name.startswith("e")]
        assert body
        assert all(torch.equal(first[name], second[name]) for name in body)
        assert "fresh: classifier.weight, classifier.bias" in capsys.readouterr().out

    def test_patterns_that_do_nothing_or_too_much(self, table, tmp_path):
        with pytest.raises(OptionError, match=r"'x\.\*' matches no parameter"):
            train(options(table, tmp_path, freeze=("x.*",)))
        with pytest.raises(OptionError, match="leaves nothing to learn"):
            train(options(table, tmp_path, freeze=("*",)))

    def test_weights_of_another_model(self, table, tmp_path):
        file = tmp_path / "other.pt"
        checkpoint.save(file, {"model": {"foreign": torch.zeros(2)}})
        with pytest.raises(checkpoint.CheckpointError, match="none of its 1 tensors fits"):
            train(options(table, tmp_path, init_from=str(file)))


class TestAccelerated:
    def test_trajectory_with_kernels_follows_stock(self, table, tmp_path, monkeypatch):
        trainers = []
        for accelerate in (False, True):
            chosen = tasks.settle(options(table, tmp_path, accelerate=accelerate, batch=4))
            trainers.append(Trainer(chosen, tasks.build(chosen), Processes(), CPU))
        stock, ours = trainers
        assert type(ours.model.encoder).__module__.startswith("fastops")
        for trainer in trainers:
            trainer.start_epoch()
            monkeypatch.setenv("FASTOPS_IMPL", "triton" if trainer is ours else "auto")
            for _ in range(3):
                trainer.step()
        torch.testing.assert_close(torch.tensor(ours.read_losses()), torch.tensor(stock.read_losses()))

    def test_compare(self, table, tmp_path, capsys):
        picture = tmp_path / "both.png"
        arguments = ["transformer", "--preset", "tiny", "--data", "table", "--root", str(table), "--device", "cpu"]
        assert command.main([*arguments, "--batch", "4", "--epochs", "2", "--compare", "--plot", str(picture)]) == 0
        out = capsys.readouterr().out
        assert "fastops.accelerate" in out
        assert "a ratio near 1 is what there is to see" in out
        difference = float(out.split("two loss curves: ")[1].split()[0])
        assert difference < 1e-5
        assert picture.read_bytes().startswith(b"\x89PNG")
        assert command.main([*arguments, "--compare", "--limit", "8"]) == 2
        assert "too few for a ratio" in capsys.readouterr().err

    def test_compare_counts_the_samples_of_short_rounds(self, table):
        options = tasks.settle(Options("transformer", preset="tiny", data="table", root=str(table), batch=10))
        arm = compare.Arm(options, tasks.build(options), CPU)
        arm.trainer.start_epoch()
        for count in (3, 2):
            arm.steps(count)
        assert len(arm.trainer.task.train) == 48
        assert arm.samples == [30, 18]


@pytest.mark.parametrize("epochs", [1, 2])
def test_curves_have_ticks_at_whole_epochs(epochs, monkeypatch):
    pytest.importorskip("matplotlib")
    figures = []
    monkeypatch.setattr("models.training.plots._save", lambda figure, path: figures.append(figure))
    summaries = [{"epoch": epoch, "test_loss": 2.0, "test_accuracy": 0.5} for epoch in range(1, epochs + 1)]
    progress = SimpleNamespace(losses=[2.0] * 10 * epochs, epochs=summaries)
    task = SimpleNamespace(name="some", metric="accuracy", language_model=False, baseline=0.2)
    plots.curves(progress, task, 10, "some.png")
    for axis in figures[0].axes:
        low, high = axis.get_xlim()
        assert high - low >= 1
        ticks = [tick for tick in axis.get_xticks() if low <= tick <= high]
        assert ticks
        assert all(tick == int(tick) for tick in ticks)


class TestCommandLine:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["bert", "--task", "lm"], "bert has no task 'lm'"),
            (["alexnet", "--data", "text"], "reads digits or cifar10"),
            (["alexnet", "--fold", "7"], "fold must be 0 to 4, got 7"),
            (["alexnet", "--root", "there"], "--root is of --data cifar10, text or table"),
            (["alexnet", "--device", "gpu"], "--device gpu: Expected one of cpu, cuda"),
            (["alexnet", "--device", "meta"], "hold no numbers"),
            (["alexnet", "--plot", "curves.doc"], "ends in .png, .svg, .pdf"),
            (["alexnet", "--plot", "/dev/null/curves.png"], "--plot: cannot write into /dev/null: "),
            (["alexnet", "--compare", "--plot", "/dev/null/curves.png"], "--plot: cannot write into /dev/null: "),
            (["alexnet", "--metrics", "/"], "--metrics /: is a folder"),
            (["alexnet", "--out", "/dev/null/runs"], "--out: cannot write into /dev/null/runs: "),
            (["lstm", "--fold", "1"], "--fold is of the digits"),
            (["lstm", "--amp", "fp16", "--device", "cpu"], "trains no LSTM in fp16 on a CPU"),
            (["lstm", "--amp", "fp16", "--device", "cpu", "--compare"], "trains no LSTM in fp16 on a CPU"),
            (["transformer", "--data", "table"], "needs --root"),
        ],
    )
    def test_one_line_for_wrong_arguments(self, arguments, message, tmp_path, monkeypatch, capsys):
        monkeypatch.chdir(tmp_path)
        assert command.main(arguments) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert message in error
        assert error.count("\n") == 1

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["alexnet", "--data", "cifar10", "--root", "/nowhere"], "is missing"),
            (["transformer", "--resume", "/nowhere.pt"], "/nowhere.pt is missing"),
            (["transformer", "--task", "lm", "--data", "text", "--root", "/nowhere"], "is not a folder"),
            (["transformer", "--data", "table", "--root", "two.csv"], "nothing is left to learn"),
            (["transformer", "--data", "table", "--root", "two.txt"], "two.txt is not a file"),
            (["transformer", "--resume", "folder"], "folder/last.pt is missing"),
            (["transformer", "--init-from", "folder"], "folder is a folder, name the file in it"),
            (["rnn", "--resume", "empty.pt"], "empty.pt is empty"),
            (["rnn", "--resume", "two.csv"], "two.csv cannot be read"),
            (["rnn", "--init-from", "two.csv"], "two.csv cannot be read"),
            (["rnn", "--resume", "bert.pt"], "was written with model 'bert', not 'rnn'"),
            (["bert", "--resume", "bert.pt", "--lr", "0.5"], "was written with learning_rate 0.1, not 0.5"),
        ],
    )
    def test_one_line_for_files_that_will_not_do(self, arguments, message, tmp_path, monkeypatch, capsys):
        monkeypatch.chdir(tmp_path)
        Path("two.csv").write_text("text,label\none,a\ntwo,b\n")
        Path("empty.pt").touch()
        Path("folder").mkdir()
        checkpoint.save("bert.pt", {"model": {}, "options": {"model": "bert", "learning_rate": 0.1}})
        assert command.main(arguments) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert message in error
        assert error.count("\n") == 1

    @pytest.mark.parametrize("package", ["tokenizers", "matplotlib"])
    def test_a_missing_package_is_a_failure(self, package, table, tmp_path, monkeypatch, capsys):
        monkeypatch.setitem(sys.modules, package, None)
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
        arguments = ["bert", "--preset", "tiny", "--data", "table", "--root", str(table), "--device", "cpu"]
        arguments += ["--out", str(tmp_path / "out"), *(["--plot", "p.png"] if package == "matplotlib" else [])]
        assert command.main(arguments) == 1
        error = capsys.readouterr().err
        assert package in error
        assert "brings all of it" in error
        assert error.count("\n") == 1

    @pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
    def test_no_gpu(self, capsys):
        assert command.main(["transformer", "--device", "cuda"]) == 2
        assert "sees no GPU" in capsys.readouterr().err

    def test_an_engine_that_is_none_or_cannot_run_here(self, table, tmp_path, monkeypatch, capsys):
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
        arguments = ["rnn", "--task", "classify", "--preset", "tiny", "--data", "table", "--root", str(table)]
        arguments += ["--device", "cpu", "--out", str(tmp_path / "out")]
        missing = "the tensors are on the CPU" if _env.TRITON_INSTALLED else "triton is not installed"
        for engine, code, message in (("tritn", 2, "FASTOPS_IMPL must be one of"), ("triton", 1, missing)):
            monkeypatch.setenv("FASTOPS_IMPL", engine)
            assert command.main(arguments) == code
            assert message in capsys.readouterr().err.splitlines()[-1]

    def test_a_smoke_run_of_every_model_is_short(self):
        settled = tasks.settle(Options("alexnet", preset="tiny"))
        assert settled.limit == 32
        assert tasks.settle(Options("alexnet", preset="tiny", limit=64)).limit == 64
        assert tasks.settle(Options("alexnet")).limit is None

    def test_the_command_to_go_on_repeats_what_no_checkpoint_keeps(self, tmp_path):
        """And nothing that it keeps, nor what a new run alone can be told."""
        text = "--root 'my texts' --epochs 7 --no-accelerate --compile --deterministic --device cpu --early-stop 2"
        text += " --save-every 5 --metrics m.jsonl --plot p.png --text-column a --label-column b"
        kept = f"--preset tiny --data table --lr 0.1 --seed 3 --freeze x --init-from old.pt --out {tmp_path}"

        def parsed(words):
            return vars(command.parser().parse_args(words))

        given = parsed(["bert", *shlex.split(f"{text} {kept}")])
        printed = Options(**given | {"freeze": ("x",)}).command_to_resume(tmp_path / "last.pt")
        start = "python -m models.train "
        assert printed.startswith(start)
        expected = parsed(["bert", "--resume", f"{tmp_path}/last.pt", *shlex.split(text)])
        assert parsed(shlex.split(printed.removeprefix(start))) == expected

    @pytest.mark.parametrize(
        "arguments",
        [
            [],
            ["resnet"],
            ["bert", "--epochs", "0"],
            ["bert", "--amp", "int8"],
            ["bert", "--lr", "nan"],
            ["bert", "--lr", "-1"],
            ["bert", "--seed", "9" * 20],
        ],
    )
    def test_wrong_arguments_exit_with_2(self, arguments):
        with pytest.raises(SystemExit) as stop:
            command.main(arguments)
        assert stop.value.code == 2


def start(*arguments, module="models.train", **popen):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    environment.pop("TRITON_INTERPRET", None)
    return subprocess.Popen(
        [sys.executable, "-m", module, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
        cwd=ROOT,
        **popen,
    )


def test_ctrl_c_saves_and_the_run_goes_on(table, tmp_path):
    metrics, out = tmp_path / "m.jsonl", tmp_path / "out"
    base = ["transformer", "--root", table, "--out", out, "--metrics", metrics, "--device", "cpu"]
    process = start(*base, "--preset", "tiny", "--data", "table", "--epochs", 100_000)
    deadline = time.time() + 120
    while process.poll() is None and time.time() < deadline:
        if metrics.exists() and '"epoch"' in metrics.read_text():
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    printed = process.communicate(timeout=60)[0]
    assert process.returncode == 130, printed
    assert "Traceback" not in printed
    go_on = " ".join(printed.split("go on with: python -m models.train ")[1].split())
    assert go_on.startswith(f"transformer --resume {out}/last.pt --root {table} --epochs 100000")
    stopped = checkpoint.load(out / "last.pt")["progress"]
    assert stopped["step"] > 0
    assert lines_of(metrics)[-1] | {"reason": "stopped", "step": stopped["step"]} == lines_of(metrics)[-1]
    resumed = Options(model="transformer", root=str(table), resume=str(out / "last.pt"), out=str(out))
    assert train(dataclasses.replace(resumed, epochs=stopped["epoch"] + 1)) == 0
    finished = checkpoint.load(out / "last.pt")["progress"]
    assert finished["epoch"] == stopped["epoch"] + 1
    assert finished["losses"][: stopped["step"]] == stopped["losses"]


def test_no_run_writes_over_anothers_checkpoints(table, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fresh = options(table, tmp_path, epochs=1, out=None)
    assert train(fresh) == 0
    first = Path("runs/transformer/last.pt").read_bytes()
    assert train(fresh) == 0
    assert Path("runs/transformer/last.pt").read_bytes() == first
    assert Path("runs/transformer-2/last.pt").exists()
    with pytest.raises(OptionError, match="--out runs/transformer: an earlier run's checkpoints are there; go on with"):
        train(dataclasses.replace(fresh, out="runs/transformer"))
    resumed = Options(model="transformer", root=str(table), resume="runs/transformer/last.pt", epochs=2)
    assert train(resumed) == 0
    assert checkpoint.load(Path("runs/transformer/last.pt"))["progress"]["epoch"] == 2
    assert train(dataclasses.replace(resumed, resume="runs/transformer", epochs=3)) == 0
    assert checkpoint.load(Path("runs/transformer/last.pt"))["progress"]["epoch"] == 3
    assert not Path("runs/transformer-3").exists()


def test_runs_at_the_same_time_have_folders_of_their_own(table, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fresh = options(table, tmp_path, epochs=1, out=None)
    with folder.claimed(fresh) as first, folder.claimed(fresh) as second:
        assert (first.out, second.out) == ("runs/transformer", "runs/transformer-2")
        with pytest.raises(OptionError, match="another training is running there"):
            train(dataclasses.replace(fresh, out="runs/transformer"))
    with folder.claimed(fresh) as again:  # nobody saved, and both are gone
        assert again.out == "runs/transformer"


def test_a_refused_run_leaves_no_folder_behind(table, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("mine").mkdir()
    refused = options(table, tmp_path, epochs=1, out=None, init_from="nowhere.pt")
    for out in (None, "new/deeper", "mine/deeper", "mine"):
        with pytest.raises(checkpoint.CheckpointError, match=r"nowhere\.pt is missing"):
            train(dataclasses.replace(refused, out=out))
    assert not Path("runs").exists()
    assert not Path("new").exists()
    assert list(Path("mine").iterdir()) == []
    with pytest.raises(checkpoint.CheckpointError):
        train(dataclasses.replace(refused, out="kept/run", metrics="kept/metrics.jsonl"))
    assert not Path("kept/run").exists()


def test_ctrl_c_before_the_first_step_leaves_no_folder_and_no_traceback(table, tmp_path, monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tasks, "build", interrupted)
    assert command.main(["transformer", "--root", str(table), "--data", "table", "--out", "new/run"]) == 130
    assert capsys.readouterr().err == "stopped at once; what was saved before is all there is\n"
    assert not Path("new").exists()


def test_only_the_run_itself_goes_on_in_its_folder(table, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert train(options(table, tmp_path, epochs=1, out="mine")) == 0
    assert train(options(table, tmp_path, epochs=1, out="other")) == 0
    shutil.copy("mine/last.pt", "other/mine.pt")
    resumed = Options(model="transformer", root=str(table), resume="other/mine.pt", epochs=2)
    with pytest.raises(OptionError, match="--out other: an earlier run's checkpoints are there"):
        train(resumed)
    shutil.copy("mine/last.pt", "mine/best.pt")
    assert train(dataclasses.replace(resumed, resume="mine/last.pt")) == 0
    shutil.copy("other/last.pt", "mine/best.pt")
    with pytest.raises(OptionError, match=r"mine/last.pt is further on, by \d+ steps"):
        train(dataclasses.replace(resumed, resume="mine/best.pt", epochs=3))
    with pytest.raises(OptionError, match="give one of them"):
        train(dataclasses.replace(resumed, init_from="other/last.pt"))


def test_a_run_that_gets_no_better_in_a_new_folder_names_no_best(table, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    still = options(table, tmp_path, epochs=1, out="a", learning_rate=0.0)
    assert train(still) == 0
    assert "weights in a/best.pt (best) and a/last.pt (last)" in capsys.readouterr().out
    assert train(dataclasses.replace(still, resume="a/last.pt", out="b", epochs=2)) == 0
    assert "weights in b/last.pt (last)" in capsys.readouterr().out
    assert not Path("b/best.pt").exists()


def test_a_reader_that_leaves_ends_no_training(table, tmp_path):
    out = tmp_path / "out"
    process = start("transformer", "--preset", "tiny", "--data", "table", "--root", table, "--epochs", 3, "--out", out)
    process.stdout.close()
    assert process.wait(timeout=120) == 0
    assert checkpoint.load(out / "last.pt")["progress"]["epoch"] == 3


def test_the_command_to_go_on_starts_as_many_processes():
    words = Options(model="lstm", epochs=3, out="o").command_to_resume(Path("o/last.pt"), 4)
    assert words == "torchrun --nproc-per-node=4 -m models.train lstm --resume o/last.pt --epochs 3"


def test_two_processes_learn_as_one_with_the_double_batch(table, tmp_path):
    """torchrun, gloo, DistributedDataParallel: 48 texts are 5 batches of 10, the last one short."""
    base = ["transformer", "--preset", "tiny", "--data", "table", "--root", table, "--device", "cpu", "--epochs", 2]
    files = [tmp_path / "two.jsonl", tmp_path / "one.jsonl"]
    launcher = ["--standalone", "--nproc-per-node", 2, "-m", "models.train"]
    two = [*launcher, *base, "--batch", 5, "--metrics", files[0], "--out", tmp_path / "two"]
    process = start(*two, module="torch.distributed.run")
    printed = process.communicate(timeout=240)[0]
    assert process.returncode == 0, printed
    one = {"epochs": 2, "batch": 10, "metrics": str(files[1]), "out": str(tmp_path / "one")}
    assert train(options(table, tmp_path, **one)) == 0
    states = [checkpoint.load(tmp_path / name / "last.pt") for name in ("two", "one")]
    assert states[0]["world"] == 2
    losses = [torch.tensor(state["progress"]["losses"]) for state in states]
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-4, atol=1e-5)
    scores = [[event["test_loss"] for event in lines_of(file) if event["event"] == "epoch"] for file in files]
    torch.testing.assert_close(torch.tensor(scores[0]), torch.tensor(scores[1]), rtol=1e-4, atol=1e-5)
    with pytest.raises(checkpoint.CheckpointError, match="written by 2 processes, this run has 1"):
        train(Options(model="transformer", root=str(table), resume=str(tmp_path / "two" / "last.pt"), epochs=3))
