"""Every model of models.train: a tiny run, accelerated as stock, and (slow) a short real training that learns."""

import pytest
import torch

import fastops
from models.training import checkpoint, tasks
from models.training.distributed import Processes
from models.training.loop import Trainer
from models.training.options import Options
from models.training.run import train

pytest.importorskip("tokenizers")
CPU = torch.device("cpu")
ALL = [(model, task) for model, known in tasks.KINDS.items() for task in known]


@pytest.fixture
def sources(tmp_path):
    """--data and --root for each task: real digits, and small files in place of the standard library."""
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text("it was the best of times, it was the worst of times. " * 40)
    rows = [f"{'good' if n % 2 else 'bad'} number {'x' * (n % 7 + 1)},{'yes' if n % 2 else 'no'}" for n in range(40)]
    (tmp_path / "table.csv").write_text("text,label\n" + "\n".join(rows))
    return {
        "lm": {"data": "text", "root": str(tmp_path / "text")},
        "classify": {"data": "table", "root": str(tmp_path / "table.csv")},
        "images": {"data": "digits"},
    }


def tiny(model, task, sources, **changes):
    source = sources["images" if model == "alexnet" else task]
    return Options(model=model, task=task, preset="tiny", device="cpu", **source, **changes)


def skip_without(model):
    pytest.importorskip({"alexnet": "sklearn", "bert": "transformers"}.get(model, "torch"))


@pytest.mark.parametrize(("model", "task"), ALL)
def test_a_tiny_run(model, task, sources, tmp_path):
    skip_without(model)
    assert train(tiny(model, task, sources, out=str(tmp_path / "out"), limit=16)) == 0
    progress = checkpoint.load(tmp_path / "out" / "last.pt")["progress"]
    assert progress["epoch"] == 1
    assert len(progress["losses"]) == 16 // (4 if model == "alexnet" else 8)


@pytest.mark.parametrize(("model", "task"), ALL)
def test_accelerated_is_stock(model, task, sources, monkeypatch):
    """Loss and every gradient, by the kernels (in the interpreter on a CPU); AlexNet by stock PyTorch, see below."""
    skip_without(model)
    options = tasks.settle(tiny(model, task, sources, batch=4))
    trainer = Trainer(options, tasks.build(options), Processes(), CPU)
    assert fastops.explain(trainer.model).accelerated
    batch = trainer.task.train.batch(torch.arange(2 if model == "alexnet" else 4), CPU)
    trainer.model.eval()  # no dropout

    def gradients():
        trainer.model.zero_grad()
        loss = trainer.loss(trainer.model, batch)
        loss.backward()
        return {"loss": loss} | {name: p.grad for name, p in trainer.model.named_parameters() if p.grad is not None}

    if model != "alexnet":
        monkeypatch.setenv("FASTOPS_IMPL", "triton")
    ours = gradients()
    monkeypatch.delenv("FASTOPS_IMPL", raising=False)
    fastops.restore(trainer.model)
    stock = gradients()
    assert ours.keys() == stock.keys()
    for name, expected in stock.items():
        torch.testing.assert_close(ours[name], expected, rtol=1e-4, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.slow
def test_alexnet_by_one_pass_epilogues(sources, monkeypatch):
    """All of AlexNet through the hybrid engine: PyTorch's convolutions, fastops' bias + ReLU + pool, and backward."""
    pytest.importorskip("sklearn")
    options = tasks.settle(tiny("alexnet", "classify", sources))
    trainer = Trainer(options, tasks.build(options), Processes(), CPU)
    batch = trainer.task.train.batch(torch.arange(1), CPU)
    trainer.model.eval()
    losses = []
    for impl in ("auto", "hybrid"):
        monkeypatch.setenv("FASTOPS_IMPL", impl)
        trainer.model.zero_grad()
        loss = trainer.loss(trainer.model, batch)
        loss.backward()
        losses.append((loss.detach(), [parameter.grad.clone() for parameter in trainer.model.parameters()]))
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-3, atol=1e-5)


# what a run of the defaults reaches is in docs/training.md; here a part of it, as far as minutes allow
LEARNS = {
    ("alexnet", "classify"): (3, None, 0.5),
    ("rnn", "lm"): (1, 3000, 3.8),
    ("lstm", "lm"): (1, 3000, 3.8),
    ("transformer", "classify"): (2, None, 0.5),
    ("transformer", "lm"): (1, 3000, 3.8),
    ("bert", "classify"): (2, None, 0.3),
}


@pytest.mark.slow
@pytest.mark.parametrize(("model", "task"), LEARNS)
def test_a_short_real_training_learns(model, task, tmp_path):
    skip_without(model)
    epochs, limit, wanted = LEARNS[model, task]
    options = Options(model=model, task=task, epochs=epochs, limit=limit, device="cpu", out=str(tmp_path))
    assert train(options) == 0
    best = checkpoint.load(tmp_path / "best.pt")["progress"]["best"]
    assert best < wanted if task == "lm" else best > wanted
